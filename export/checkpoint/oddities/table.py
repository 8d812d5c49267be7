"""The table of what checkpoints in the wild are, other than plain weights.

Each row has a marker, what it is, and what to do about it.

    QUANTIZATIONS   weights that another tool has quantized
    UNUSABLE        tensors that are not the weights of a model, or not yet
    WRAPPERS        parts of names that training frameworks put around a model's own
    LEFT_OUT        files that lie next to weights and are none
    ELSEWHERE       files and folders of other formats, where weights were expected
    CONTAINERS      keys under which a trainer's pickle holds the model

``docs/reference/checkpoints.md`` shows the same tables, and tests take their cases from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = [
    "CONTAINERS",
    "ELSEWHERE",
    "LEFT_OUT",
    "QUANTIZATIONS",
    "UNUSABLE",
    "WRAPPERS",
    "Oddity",
    "Quantization",
    "is_method",
    "method_name",
    "odd_file",
    "oddity_of",
    "quantization_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A way in which weights were quantized by another tool."""

    name: str
    methods: tuple[str, ...] = ()  # quant_method in a config
    markers: tuple[str, ...] = ()  # in ".NAME." of a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Oddity:
    """Something that is not a model's weights."""

    what: str
    markers: tuple[str, ...]  # in ".NAME." of a tensor, or patterns of a file's name
    remedy: str


# The first whose marker is in a name; more special ones stand first.
QUANTIZATIONS = (
    Quantization(name="GPTQ", methods=("gptq", "gptqmodel"), markers=(".g_idx.",)),
    Quantization(name="AWQ", methods=("awq",), markers=(".qweight.", ".qzeros.")),
    Quantization(
        name="bitsandbytes in 4 bits",
        methods=("bitsandbytes_4bit",),
        markers=(".quant_state.", ".absmax.", ".nested_absmax.", ".quant_map."),
    ),
    Quantization(
        name="bitsandbytes in 8 bits (LLM.int8)",
        methods=("bitsandbytes_8bit",),
        markers=(".SCB.", ".weight_format."),
    ),
    Quantization(
        name="compressed-tensors",
        methods=("compressed-tensors", "sparseml"),
        markers=(".weight_packed.", ".weight_shape."),
    ),
    Quantization(
        name="NVFP4 of ModelOpt",
        methods=("modelopt", "modelopt_fp4"),
        markers=(".weight_scale_2.",),
    ),
    Quantization(name="Quanto", methods=("quanto",), markers=("._data.", ".weight._scale.")),
    Quantization(
        name="FP8",
        methods=("fp8", "fbgemm_fp8", "finegrained_fp8"),
        markers=(".weight_scale_inv.", ".weight_scale.", ".input_scale.", ".activation_scale."),
    ),
    Quantization(name="EETQ", methods=("eetq",), markers=(".weight_scales.",)),
    Quantization(name="MXFP4", methods=("mxfp4",), markers=("_blocks.", "_scales.")),
    Quantization(name="MLX", methods=("mlx",), markers=(".biases.",)),
    Quantization(name="HQQ", methods=("hqq",), markers=(".W_q.",)),
    Quantization(name="AQLM", methods=("aqlm",), markers=(".codebooks.", ".codes.")),
    Quantization(name="VPTQ", methods=("vptq",), markers=(".centroids.",)),
    Quantization(name="QuIP#", methods=("quip",), markers=(".Qidxs.",)),
    Quantization(name="SpQR", methods=("spqr",), markers=(".dense_weights.",)),
    Quantization(
        name="ExLlama",
        methods=("exl2", "exl3"),
        markers=(".q_scale_max.", ".q_invperm.", ".q_groups.", ".trellis."),
    ),
    Quantization(name="Marlin", methods=("marlin",), markers=(".workspace.",)),
    Quantization(name="torchao", methods=("torchao",)),
    Quantization(name="HIGGS", methods=("higgs",)),
    Quantization(name="BitNet", methods=("bitnet",)),
    Quantization(name="Quark", methods=("quark",)),
    Quantization(name="AutoRound", methods=("auto-round", "intel/auto-round")),
    Quantization(
        name="PyTorch's own quantization",
        markers=("._packed_params.", ".weight_fake_quant.", ".zero_point."),
    ),
)

UNUSABLE = (
    Oddity(
        what="LoRA or another adapter of PEFT, not merged into the weights",
        markers=(
            ".lora_A.",
            ".lora_B.",
            ".lora_embedding_A.",
            ".lora_embedding_B.",
            ".lora_magnitude_vector.",
            ".lora_down.",
            ".lora_up.",
            ".base_layer.",
            ".modules_to_save.",
            ".original_module.",
            ".ia3_l.",
            ".vera_lambda_b.",
            ".hada_w1_a.",
            ".lokr_w1.",
            ".lokr_w1_a.",
            ".oft_r.",
            ".boft_R.",
            ".hra_u.",
        ),
        remedy="merge first: load it with peft, call merge_and_unload() and save_pretrained()",
    ),
    Oddity(
        what="flattened parameters of FSDP",
        markers=("._flat_param.", ".flat_param_0.", ".flat_param."),
        remedy="save again with StateDictType.FULL_STATE_DICT",
    ),
    Oddity(
        what="an optimizer's state",
        markers=(".exp_avg.", ".exp_avg_sq.", ".momentum_buffer.", ".master_weights."),
        remedy="name the folder with the weights themselves",
    ),
    Oddity(
        what="weights under torch.nn.utils.parametrize or weight_norm",
        markers=(".parametrizations.", ".weight_g.", ".weight_v."),
        remedy="call remove_parametrizations (or remove_weight_norm), and save again",
    ),
    Oddity(
        what="weights that are being pruned",
        markers=(".weight_orig.", ".weight_mask."),
        remedy="call torch.nn.utils.prune.remove, and save again",
    ),
    Oddity(
        what="averaged weights (EMA) beside the weights",
        markers=(".ema_model.", ".model_ema.", ".ema."),
        remedy="keep one of the two, under the model's own names",
    ),
)

# Parts of a name, wherever they stand in it → whose they are. No model of ours has such a part.
WRAPPERS = {
    "module": "DataParallel, DistributedDataParallel or DeepSpeed",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "state_dict": "a trainer's dictionary",
    "base_model.model": "PEFT",
}

LEFT_OUT = (
    Oddity(
        what="an adapter (LoRA) that is not part of the weights",
        markers=("adapter*", "lora*", "pytorch_lora_weights*", "non_lora_trainables*"),
        remedy="merge first, if the model is meant with it: peft's merge_and_unload()",
    ),
    Oddity(
        what="an optimizer's state",
        markers=("optimizer*", "*optim_states*", "optim.*", "optim-*"),
        remedy="nothing reads it here",
    ),
    Oddity(
        what="a trainer's state",
        markers=(
            "scheduler*",
            "rng_state*",
            "random_states*",
            "training_args*",
            "trainer_state*",
            "train_state*",
            "scaler*",
            "sampler*",
            "dataloader*",
        ),
        remedy="nothing reads it here",
    ),
    Oddity(
        what="the same weights in their authors' own format",
        markers=("consolidated*",),
        remedy="nothing reads it where there are others",
    ),
    Oddity(
        what="averaged weights (EMA)",
        markers=("ema*", "*_ema.*", "*-ema.*", "*.ema.*"),
        remedy="take them instead of the others by moving the others away",
    ),
)

ELSEWHERE = (
    Oddity(
        what="GGUF, which llama.cpp runs",
        markers=("*.gguf",),
        remedy="take the safetensors that it was made from",
    ),
    Oddity(
        what="a distributed checkpoint (torch.distributed.checkpoint, FSDP)",
        markers=("*.distcp", "__*_*.distcp", ".metadata"),
        remedy="gather it first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch",
    ),
    Oddity(
        what="shards of DeepSpeed ZeRO",
        markers=("zero_to_fp32.py", "global_step*", "zero_pp_rank_*", "mp_rank_*"),
        remedy="gather them first: python zero_to_fp32.py . OUTPUT",
    ),
    Oddity(
        what="weights of TensorFlow, Keras or Flax",
        markers=("*.h5", "*.msgpack", "*.ckpt.index", "*.keras"),
        remedy="take the PyTorch weights",
    ),
    Oddity(
        what="a compiled model, not a checkpoint",
        markers=("*.onnx", "*.plan", "*.engine", "*.mlmodel", "*.tflite"),
        remedy="take the checkpoint that it was made from",
    ),
    Oddity(
        what="arrays of NumPy",
        markers=("*.npz", "*.npy"),
        remedy="take the PyTorch weights",
    ),
    Oddity(
        what="a folder of Hugging Face's cache, whose files lie below it",
        markers=("snapshots",),
        remedy="name the folder snapshots/REVISION in it",
    ),
    Oddity(
        what="a run of a trainer, whose checkpoints lie below it",
        markers=("checkpoint-*",),
        remedy="name one of the folders checkpoint-STEP in it",
    ),
)

# The first that is there holds the model; what else it lies in is a trainer's.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "model_state",
    "models",
    "state_dict_ema",
    "model_ema",
    "ema",
)


def quantization_of(name: str) -> Quantization | None:
    """Find the quantization that a tensor's name speaks of."""
    whole = f".{name}."
    for quantization in QUANTIZATIONS:
        if any(marker in whole for marker in quantization.markers):
            return quantization
    return None


def method_name(method: str) -> str:
    """Name a ``quant_method`` as people do; one that is not in the table as it is."""
    for quantization in QUANTIZATIONS:
        if method.lower() in quantization.methods:
            return quantization.name
    return method


def is_method(method: str) -> bool:
    """Tell whether a ``quant_method`` is in the table."""
    return any(method.lower() in quantization.methods for quantization in QUANTIZATIONS)


def oddity_of(name: str) -> Oddity | None:
    """Find what a tensor is that belongs to no model, by its name."""
    whole = f".{name}."
    for oddity in UNUSABLE:
        if any(marker in whole for marker in oddity.markers):
            return oddity
    return None


def odd_file(name: str, table: Iterable[Oddity]) -> Oddity | None:
    """Find what a file is, by its name, in ``LEFT_OUT`` or ``ELSEWHERE``."""
    for oddity in table:
        if any(fnmatchcase(name.lower(), pattern) for pattern in oddity.markers):
            return oddity
    return None
