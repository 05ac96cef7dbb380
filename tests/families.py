"""Model families as tiny configs, with what is stated of each: its task, its number of blocks, whether it attends."""

from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

AUTO = {
    "text": transformers.AutoModelForSequenceClassification,
    "causal": transformers.AutoModelForCausalLM,
    "image": transformers.AutoModelForImageClassification,
}


class Family(NamedTuple):
    """What is known of a family from its config alone.

    Attributes:
        kind: ``text``, ``causal`` or ``image``.
        config: Transformers' class, without its ``Config``.
        values: of the config.
        blocks: transformer blocks, by the numbers of the config.
        attends: whether a block has attention with linear layers.
    """

    kind: str
    config: str
    values: dict[str, Any]
    blocks: int
    attends: bool = True

    def make(self) -> Any:
        """The config."""
        return getattr(transformers, f"{self.config}Config")(**self.values)

    def model(self, device: str = "meta") -> nn.Module:
        """A model of three classes; on a device that has memory, of random weights that all count."""
        config = self.make()
        config.num_labels, config.architectures = 3, []
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            model = AUTO[self.kind].from_config(config).eval()
            for name, parameter in model.named_parameters() if device != "meta" else ():
                if "lambda" in name or "layer_scale" in name:
                    parameter.data.fill_(1.0)  # as trained ones are; blocks hardly count at their start
                elif parameter.ndim > 1:
                    many = parameter[0].numel() if parameter.ndim == 4 else 0  # numbers that a convolution adds up
                    parameter.data.normal_(0, 2 * many**-0.5 if many else 0.2)
        return model


RATE = 2.0
"""A learning rate at which a step changes a tiny model by much."""
RATES = {"hiera": 0.1}
"""Where it takes maxima over positions: after a large step, rounding may choose another one."""

V = 45
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
ENC = {"vocab_size": V, **SIZES, "max_position_embeddings": 32, **IDS}
DEC = {**ENC, "num_key_value_heads": 2}
OLD = {"vocab_size": V, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, **IDS}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMG = {"image_size": 32, "num_channels": 3}
VIT = {**SIZES, "patch_size": 8, **IMG}
STAGES = {**IMG, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
FOUR = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 2, 1]}
VISION = {**{k: v for k, v in VIT.items() if k != "num_channels"}, "num_hidden_layers": 2}
TOWERS = {"text_config": {**SIZES, "vocab_size": V, "num_hidden_layers": 1}, "vision_config": VIT}
T5 = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
BART = {
    **{"vocab_size": V, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 32, **IDS},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
}
DEEPSEEK = {
    **{**DEC, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 12},
    **{"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
}
LONGCAT = {
    **{"vocab_size": V, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 24, **IDS},
    **{"expert_ffn_hidden_size": 8, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 8},
    **{"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4},
}
HIERA = {"patch_size": [3, 3], "patch_stride": [1, 1], "patch_padding": [1, 1], "masked_unit_size": [8, 8]}
# Without training, numbers grow from block to block where nothing normalises them.
MOBILE = {"num_feedforward_networks": 4, "normalization_type": "layer_norm"}
XLM = {"vocab_size": V, "emb_dim": 16, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 32, **IDS}
BLOOM = {"vocab_size": V, "hidden_size": 16, "n_layer": 3, "n_head": 4, **IDS}
FAMILIES = {
    "bert": Family("text", "Bert", ENC, 3),
    "roberta": Family("text", "Roberta", ENC, 3),
    "distilbert": Family("text", "DistilBert", {"vocab_size": V, "dim": 16, "n_layers": 3, "n_heads": 4, **IDS}, 3),
    "electra": Family("text", "Electra", {**ENC, "embedding_size": 12}, 3),
    "deberta-v2": Family("text", "DebertaV2", {**ENC, "relative_attention": True, "pos_att_type": "p2c|c2p"}, 3),
    "albert": Family("text", "Albert", {**ENC, "embedding_size": 12}, 1),  # one that runs three times
    "albert-groups": Family("text", "Albert", {**ENC, "num_hidden_groups": 3, "inner_group_num": 2}, 6),
    "mobilebert": Family("text", "MobileBert", {**ENC, "embedding_size": 16, **MOBILE}, 3),
    "modernbert": Family("text", "ModernBert", {**ENC, "cls_token_id": 2, "sep_token_id": 3}, 3),
    "mpnet": Family("text", "MPNet", ENC, 3),
    "xlm-roberta": Family("text", "XLMRoberta", ENC, 3),
    "rembert": Family("text", "RemBert", {**ENC, "input_embedding_size": 12}, 3),
    "roformer": Family("text", "RoFormer", {**ENC, "embedding_size": 16}, 3),
    "deberta": Family("text", "Deberta", {**ENC, "relative_attention": True, "pos_att_type": "c2p|p2c"}, 3),
    "longformer": Family("text", "Longformer", {**ENC, "attention_window": 8}, 3),
    "big_bird": Family("text", "BigBird", ENC, 3),
    "convbert": Family("text", "ConvBert", {**ENC, "embedding_size": 16}, 3),
    "nystromformer": Family("text", "Nystromformer", {**ENC, "num_landmarks": 8, "segment_means_seq_len": 8}, 3),
    "yoso": Family("text", "Yoso", {**ENC, "use_expectation": True}, 3),
    "squeezebert": Family("text", "SqueezeBert", {**ENC, "embedding_size": 16}, 0, False),  # its pooler alone is linear
    "xlm": Family("text", "XLM", XLM, 6),  # attentions are a list, and so are the networks after them
    "flaubert": Family("text", "Flaubert", XLM, 6),
    "xlnet": Family(
        "text", "XLNet", {"vocab_size": V, "d_model": 16, "n_layer": 3, "n_head": 4, "d_inner": 24, **IDS}, 3, False
    ),
    "fnet": Family("text", "FNet", {k: v for k, v in ENC.items() if k != "num_attention_heads"}, 3, False),
    "funnel": Family("text", "Funnel", {"vocab_size": V, "block_sizes": [2, 1], "d_model": 16, "d_inner": 24}, 3),
    "canine": Family("text", "Canine", {**SIZES, "num_hash_buckets": 64}, 5),  # two of characters around them
    "t5": Family("text", "T5", {**T5, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}, 5),
    "bart": Family("text", "Bart", BART, 5),
    "bloom-classifier": Family("text", "Bloom", BLOOM, 3),
    "qwen2-classifier": Family("text", "Qwen2", DEC, 3),
    "gpt2-classifier": Family("text", "GPT2", OLD, 3),
    "llama-classifier": Family("text", "Llama", DEC, 3),
    "llama": Family("causal", "Llama", DEC, 3),
    "mistral": Family("causal", "Mistral", {**DEC, "sliding_window": 8}, 3),
    "qwen2": Family("causal", "Qwen2", DEC, 3),
    "qwen3": Family("causal", "Qwen3", {**DEC, "head_dim": 8}, 3),
    "smollm3": Family("causal", "SmolLM3", DEC, 3),
    "stablelm": Family("causal", "StableLm", DEC, 3),
    "olmo2": Family("causal", "Olmo2", DEC, 3),
    "granite": Family("causal", "Granite", DEC, 3),
    "cohere": Family("causal", "Cohere", DEC, 3),
    "gemma": Family("causal", "Gemma", {**DEC, "head_dim": 8}, 3),
    "gemma3": Family("causal", "Gemma3Text", {**DEC, "head_dim": 8, "sliding_window": 8}, 3),
    "phi": Family("causal", "Phi", DEC, 3),
    "gpt2": Family("causal", "GPT2", OLD, 3),
    "gpt_neo": Family(
        "causal",
        "GPTNeo",
        {
            **{"vocab_size": V, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 32},
            **{"attention_types": [[["global", "local"], 1]], "window_size": 8, **IDS},
        },
        2,
    ),
    "codegen": Family("causal", "CodeGen", {**OLD, "rotary_dim": 4}, 3),
    "recurrent_gemma": Family("causal", "RecurrentGemma", {**DEC, "lru_width": 16, "attention_window_size": 8}, 3),
    "gemma2": Family("causal", "Gemma2", {**DEC, "head_dim": 8, "sliding_window": 16}, 3),
    "phi3": Family("causal", "Phi3", DEC, 3),
    "falcon": Family("causal", "Falcon", {**ENC, "new_decoder_architecture": False, "multi_query": True}, 3),
    "gptj": Family("causal", "GPTJ", {**OLD, "rotary_dim": 4}, 3),
    "gpt_neox": Family("causal", "GPTNeoX", ENC, 3),
    "opt": Family("causal", "OPT", {**ENC, "ffn_dim": 24, "word_embed_proj_dim": 8}, 3),
    "bloom": Family("causal", "Bloom", BLOOM, 3),
    "mpt": Family("causal", "Mpt", {"vocab_size": V, "d_model": 16, "n_heads": 4, "n_layers": 3, **IDS}, 3),
    "mixtral": Family("causal", "Mixtral", {**DEC, "num_local_experts": 4, "num_experts_per_tok": 2}, 3),
    "qwen2_moe": Family("causal", "Qwen2Moe", {**DEC, **MOE, "shared_expert_intermediate_size": 24}, 3),
    "qwen3_moe": Family("causal", "Qwen3Moe", {**DEC, **MOE, "head_dim": 8}, 3),
    "gpt_oss": Family("causal", "GptOss", {**DEC, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, 3),
    "llama4": Family(
        "causal", "Llama4Text", {**DEC, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 24}, 3
    ),
    "deepseek_v3": Family("causal", "DeepseekV3", DEEPSEEK, 3),
    "longcat": Family("causal", "LongcatFlash", LONGCAT, 2),  # each has two attentions and two MLPs, in lists
    "mamba": Family(
        "causal", "Mamba", {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}, 3, False
    ),
    "mamba2": Family(
        "causal",
        "Mamba2",
        {**SIZES, "vocab_size": V, "state_size": 4, "num_heads": 8, "head_dim": 4, "n_groups": 1, "chunk_size": 8},
        3,
        False,
    ),
    "rwkv": Family(
        "causal", "Rwkv", {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24}, 3
    ),
    "gemma3-images": Family(
        "causal",
        "Gemma3",
        {"text_config": {**DEC, "head_dim": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
        3,
    ),
    "vit": Family("image", "ViT", VIT, 3),
    "deit": Family("image", "DeiT", VIT, 3),
    "beit": Family("image", "Beit", {**VIT, "use_relative_position_bias": True}, 3),
    "dinov2": Family("image", "Dinov2", {k: v for k, v in VIT.items() if k != "intermediate_size"}, 3),
    "swin": Family("image", "Swin", STAGES, 3),
    "swinv2": Family("image", "Swinv2", STAGES, 3),
    "focalnet": Family(
        "image",
        "FocalNet",
        {**IMG, "embed_dim": 16, "depths": [1, 2], "focal_levels": [1, 1], "focal_windows": [3, 3]},
        3,
        False,
    ),
    "convnext": Family("image", "ConvNext", {**IMG, **FOUR}, 5, False),
    "segformer": Family("image", "Segformer", {**FOUR, "num_attention_heads": [1, 1, 2, 2]}, 5),
    "pvt_v2": Family("image", "PvtV2", {"image_size": 32, **FOUR, "num_attention_heads": [1, 1, 2, 2]}, 5),
    "mobilevit": Family(
        "image",
        "MobileViT",
        {
            **IMG,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
            "num_attention_heads": 2,
            "patch_size": 2,
        },
        9,
    ),
    "cvt": Family(
        "image",
        "Cvt",
        {"num_channels": 3, "embed_dim": [16, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        6,
    ),
    "pvt": Family("image", "Pvt", {**IMG, **FOUR, "num_attention_heads": [1, 1, 2, 2]}, 5),
    "hiera": Family(
        "image",
        "Hiera",
        {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], **HIERA},
        4,
    ),
    "convnextv2": Family("image", "ConvNextV2", {**IMG, **FOUR}, 5, False),
    "clip": Family("image", "CLIP", {**TOWERS, "projection_dim": 16}, 3),
    "siglip": Family("image", "Siglip", TOWERS, 3),
}
CONVOLUTIONS = {
    "resnet": Family("image", "ResNet", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, 0, False),
    "regnet": Family(
        "image",
        "RegNet",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
        0,
        False,
    ),
    "efficientnet": Family(
        "image",
        "EfficientNet",
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 64},
        0,
        False,
    ),
    "poolformer": Family("image", "PoolFormer", FOUR, 0, False),
    "mobilenet_v2": Family("image", "MobileNetV2", {**IMG, "depth_multiplier": 0.25}, 0, False),
    "pp_lcnet": Family("image", "PPLCNet", {}, 0, False),  # its class names a backbone that is not there
}
