"""Compute the golden numbers of the chat family by transformers, and compare or replace them.

    PYTHONPATH=tests python -m support.checkpoints.golden_family [--write] [FOLDER]

FOLDER is an unpacked family; without one the repository's is unpacked, and with ``--write`` packed
again. It wants transformers 5.23.0 and torch 2.13.0, of which the numbers are.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.golden import PACKED_FAMILY, read_golden, thinned, unpack_family
from transformers import InternVLForConditionalGeneration

INPUTS = ("pixel_values", "input_ids", "attention_mask")
TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.write and given.folder is not None:
        parser.error("--write replaces the repository's numbers; leave FOLDER out")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = given.folder or unpack_family(Path(work), is_new=given.write)
        for kind in sorted(path.parent for path in folder.glob("*/reference.npz")):
            known = read_golden(kind / "reference.npz")
            new = computed(kind, known)
            print(f"{kind.name}: {difference(new, known)}", flush=True)
            if given.write:
                stored: dict[str, Any] = {}
                for name, array in new.items():
                    stored |= {name: array} if is_input(name) else thinned(name, array)
                np.savez(kind / "reference.npz", **stored)
        if given.write:
            pack(folder)


def is_input(name: str) -> bool:
    return name.rpartition(".")[2] in INPUTS


def computed(kind: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Compute every number of a kind from the inputs that are known."""
    model = InternVLForConditionalGeneration.from_pretrained(
        kind / "hf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = json.loads((kind / "prompt_cases.json").read_text(encoding="utf-8"))["cases"]
    fed = {n: torch.from_numpy(a) for n, a in known.items() if is_input(n)}
    pixels, ids, text = fed["pixel_values"], fed["input_ids"], fed["text.input_ids"]
    both = {n: fed[f"batch.{n}"] for n in INPUTS}
    mask = both["attention_mask"]
    with torch.inference_mode():
        tower = model.model.vision_tower(pixels)
        features = model.model.get_image_features(pixels).pooler_output
        whole = model(pixel_values=pixels, input_ids=ids, use_cache=True)
        found: dict[str, Any] = {
            "vit.last_hidden_state": tower.last_hidden_state,
            "image_features": features,
            "inputs_embeds": embedded(model, ids, features),
            "logits": whole.logits,
            "batch.logits": model(**both, position_ids=places(mask)).logits * mask[..., None],
            "text.logits": model(input_ids=text).logits,
        }
        for i in (0, len(whole.past_key_values.layers) - 1):
            layer = whole.past_key_values.layers[i]
            found |= {f"kv.{i}.k": layer.keys, f"kv.{i}.v": layer.values}
        alone = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        greedy, gap = generated(model, alone)
        rows, batch_gap = generated(model, both)
        found |= {"greedy_ids": greedy, "greedy_gap": gap}
        found |= {"batch.greedy_ids": rows, "batch.greedy_gap": batch_gap}
        if "long.input_ids" in fed:
            long = fed["long.input_ids"]
            found["long.logits"] = model(input_ids=long).logits
            given = {"input_ids": long, "attention_mask": torch.ones_like(long)}
            new, long_gap = generated(model, given, max_new_tokens=8)
            found |= {"long.greedy_ids": new, "long.greedy_gap": long_gap}
        end, beams = int(greedy[0, 9]), {"num_beams": 3}
        for name, how in (
            ("beam3", {"eos_token_id": cases["one_image"]["eos"], **beams}),
            ("ended.greedy", {"eos_token_id": end}),
            ("ended.beam3", {"eos_token_id": end, **beams}),
            ("ended.beam3.penalty0", {"eos_token_id": end, "length_penalty": 0.0, **beams}),
            ("ended.beam3.early", {"eos_token_id": end, "early_stopping": True, **beams}),
        ):
            found[f"{name}_ids"], _ = generated(model, alone, **how)
    arrays = {name: np.asarray(value) for name, value in found.items()}
    return {**{n: t.numpy() for n, t in fed.items()}, **arrays, "ended.eos": np.array(end)}


def embedded(model: Any, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == model.config.image_token_id] = features.flatten(0, 1)
    return embeds


def places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def generated(model: Any, fed: dict[str, Any], **how: Any) -> tuple[torch.Tensor, float]:
    """Generate ids, and tell the least gap of the two best logits that one was chosen from."""
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, **how}
    told = model.generate(
        **fed, **settings, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    best = torch.stack(told.logits).topk(2, dim=-1).values
    new = told.sequences[:, fed["input_ids"].shape[1] :]
    return new, float((best[..., 0] - best[..., 1]).min())


def difference(new: dict[str, Any], known: dict[str, Any]) -> str:
    """Say what differs most, of floating point and of ids."""
    worst: dict[str, float] = {}
    for name, array in known.items():
        if name not in new or name.endswith("gap"):
            continue
        if new[name].shape != array.shape:
            worst[name] = np.inf
        elif array.size:
            worst[name] = float(np.nanmax(np.abs(new[name].astype(np.float64) - array)))
    gap = min(float(new[name]) for name in new if name.endswith("gap"))
    ids = [name for name, value in worst.items() if name.endswith(("ids", "eos")) and value]
    return f"{max(worst.values()):.1e}, ids that differ: {ids or 'none'}, least gap {gap:.3f}"


def pack(folder: Path) -> None:
    """Pack the family without its weights; equal folders give equal archives."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "safetensors" not in path.name:
                info = tarfile.TarInfo(str(path.relative_to(folder)))
                info.size = path.stat().st_size
                archive.addfile(info, io.BytesIO(path.read_bytes()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 2}]
    packed = lzma.compress(file.getvalue(), format=lzma.FORMAT_XZ, filters=filters)
    PACKED_FAMILY.write_bytes(packed)


if __name__ == "__main__":
    main()
