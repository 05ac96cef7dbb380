"""Well-known hub data sets by short name: their paths, columns and splits."""

from __future__ import annotations

from polyrank.data.hub import hub
from polyrank.data.instructions import hub_instructions
from polyrank.data.prompts import Template
from polyrank.data.source import Dataset

HUB_NAMES = {
    "ag_news": "fancyzhx/ag_news",
    "alpaca": "tatsu-lab/alpaca",
    "banking77": "legacy-datasets/banking77",
    "cifar100": "uoft-cs/cifar100",
    "dolly": "databricks/databricks-dolly-15k",
    "ledgar": "coastalcph/lex_glue",
    "natural_instructions": "Muennighoff/natural-instructions",
    "sst2": "nyu-mll/glue",
}
"""What the hub calls them."""


def ag_news() -> Dataset:
    """AG News: 120,000 news items in 4 topics, 7,600 for testing.

    References:
        Zhang, Zhao, LeCun: Character-level convolutional networks for text classification, arXiv:1509.01626.
    """
    return hub(path=HUB_NAMES["ag_news"], text="text")


def alpaca(*, template: Template = "alpaca", train_on_inputs: bool = False) -> Dataset:
    """Alpaca: 52,002 instructions with responses by a larger model; a tenth is set aside for testing.

    Args:
        template: as in `instructions`.
        train_on_inputs: whether prompts are learnt as well.

    References:
        Taori et al.: Stanford Alpaca, an instruction-following LLaMA model, 2023.
    """
    return hub_instructions(path=HUB_NAMES["alpaca"], input="input", template=template, train_on_inputs=train_on_inputs)


def banking77() -> Dataset:
    """Banking77: 10,003 customer queries in 77 intents, 3,080 for testing.

    References:
        Casanueva et al.: Efficient intent detection with dual sentence encoders, arXiv:2003.04807.
    """
    return hub(path=HUB_NAMES["banking77"], text="text")


def cifar100() -> Dataset:
    """CIFAR-100: 50,000 images of 32 x 32 pixels in 100 fine classes, 10,000 for testing.

    References:
        Krizhevsky: Learning multiple layers of features from tiny images, 2009.
    """
    return hub(path=HUB_NAMES["cifar100"], image="img", label="fine_label")


def dolly(*, template: Template = "alpaca", train_on_inputs: bool = False) -> Dataset:
    """Dolly: 15,011 instructions in 8 categories, written by people; a tenth is set aside for testing.

    Args:
        template: as in `instructions`.
        train_on_inputs: whether prompts are learnt as well.

    References:
        Conover et al.: Free Dolly, the world's first truly open instruction-tuned LLM, 2023.
    """
    return hub_instructions(
        path=HUB_NAMES["dolly"],
        input="context",
        response="response",
        label="category",
        template=template,
        train_on_inputs=train_on_inputs,
    )


def ledgar() -> Dataset:
    """LEDGAR: 60,000 contract provisions in 100 classes, 10,000 each for validation and testing.

    References:
        Chalkidis et al.: LexGLUE, arXiv:2110.00976.
    """
    return hub(path=HUB_NAMES["ledgar"], config="ledgar", text="text", validation="validation")


def natural_instructions(*, template: Template = "alpaca", train_on_inputs: bool = False) -> Dataset:
    """Natural Instructions: some 1,600 tasks, each with a definition; its test split has tasks that train lacks.

    The column `task_name`, of natural clients, is kept.

    Args:
        template: as in `instructions`.
        train_on_inputs: whether prompts are learnt as well.

    References:
        Wang et al.: Super-NaturalInstructions, arXiv:2204.07705.
    """
    return hub_instructions(
        path=HUB_NAMES["natural_instructions"],
        instruction="definition",
        input="inputs",
        response="targets",
        columns=["task_name"],
        test="test",
        template=template,
        train_on_inputs=train_on_inputs,
    )


def sst2() -> Dataset:
    """SST-2 from GLUE: 67,349 film-review phrases, positive or negative, 872 for testing.

    GLUE hides its test labels, so its validation split is the test split here, as the field reports it, and
    validation is held out from train.

    References:
        Wang et al.: GLUE, arXiv:1804.07461.
    """
    return hub(path=HUB_NAMES["sst2"], config="sst2", text="sentence", test="validation")
