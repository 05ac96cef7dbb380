"""What runs beside the data: the base model, adapters attached to it, and the training loop."""

import logging

# Where bitsandbytes is installed, PEFT imports it, and it warns of kernels that are optional; later, in every pass.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
