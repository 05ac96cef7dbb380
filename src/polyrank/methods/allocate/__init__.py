"""Where does a budget go? Allocators turn a client's budget into a rank per layer."""

from polyrank.core.method import Allocate
from polyrank.methods.allocate.uniform import uniform

ALLOCATORS: dict[str, Allocate] = {
    "uniform": uniform,
}
