"""How do updates become one adapter? One rule a file; a new rule is a new file and a line here."""

from collections.abc import Callable

from polyrank.core.types import ServerState
from polyrank.methods.aggregate.fedex_lora import fedex_lora
from polyrank.methods.aggregate.fedit import fedit
from polyrank.methods.aggregate.fedsvd import fedsvd
from polyrank.methods.aggregate.flexlora import flexlora
from polyrank.methods.aggregate.flora import flora
from polyrank.methods.aggregate.hetlora import hetlora
from polyrank.methods.aggregate.hralora import hralora
from polyrank.methods.aggregate.krum import krum
from polyrank.methods.aggregate.lora_fair import lora_fair
from polyrank.methods.aggregate.norm_clipping import norm_clipping
from polyrank.methods.aggregate.rb_lora import rb_lora
from polyrank.methods.aggregate.rbla import rbla
from polyrank.methods.aggregate.trimmed_mean import median, trimmed_mean

AGGREGATORS: dict[str, Callable[..., ServerState]] = {
    "fedex_lora": fedex_lora,
    "fedit": fedit,
    "fedsvd": fedsvd,
    "flexlora": flexlora,
    "flora": flora,
    "hetlora": hetlora,
    "hralora": hralora,
    "krum": krum,
    "lora_fair": lora_fair,
    "median": median,
    "norm_clipping": norm_clipping,
    "raflora": rb_lora,  # arXiv 2602.13486 equals RB-LoRA in product space
    "rb_lora": rb_lora,
    "rbla": rbla,
    "trimmed_mean": trimmed_mean,
}
