"""Where does a budget go? Allocators turn a client's budget into a rank per layer."""

from polyrank.core.method import Allocate
from polyrank.methods.allocate.arithmetic import arithmetic
from polyrank.methods.allocate.geometric import geometric, random_geometric
from polyrank.methods.allocate.knapsack import knapsack
from polyrank.methods.allocate.proportional import proportional
from polyrank.methods.allocate.random_layers import random_layers
from polyrank.methods.allocate.sampled import sampled
from polyrank.methods.allocate.uniform import uniform

ALLOCATORS: dict[str, Allocate] = {
    "arithmetic": arithmetic,
    "geometric": geometric,
    "knapsack": knapsack,
    "proportional": proportional,
    "random_geometric": random_geometric,
    "random_layers": random_layers,
    "sampled": sampled,
    "uniform": uniform,
}
