"""Peak memory of quantizing a released language model layer by layer, and in memory, on a random LLaDA-format folder.

python -m bench.streamed [layers=8] [hidden=1024] [vocabulary=1024] [rows=16] [length=512] [dtype=float32]
    [method=quant_dllm] [bits=w2a32] [json=PATH]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.table import AT_MOST, Ratio
from dqbench.commands import command, split_json
from dqbench.errors import UserError

DEFAULTS = {
    "layers": "8", "hidden": "1024", "vocabulary": "1024", "rows": "16", "length": "512", "dtype": "float32",
    "method": "quant_dllm", "bits": "w2a32",
}  # fmt: skip
TARGET = 0.6
ROOT = Path(__file__).resolve().parents[1]


def shapes(layers: int, d: int, vocabulary: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File -> tensor -> shape of a LLaDA whose feed-forward is 3 d wide, one decoder layer in each file."""
    transformer = "model.transformer"
    found = {"outer": {f"{transformer}.{name}.weight": (vocabulary, d) for name in ("wte", "ff_out")}}
    found["outer"] |= {f"{transformer}.ln_f.weight": (d,)}
    sizes = dict.fromkeys(("attn_norm", "ff_norm"), (d,)) | dict.fromkeys(("q_proj", "k_proj", "v_proj"), (d, d))
    sizes |= {"attn_out": (d, d), "ff_proj": (3 * d, d), "up_proj": (3 * d, d), "ff_out": (d, 3 * d)}
    for i in range(layers):
        found[f"block{i}"] = {f"{transformer}.blocks.{i}.{name}.weight": shape for name, shape in sizes.items()}
    return found


def make(folder: Path, layers: int, d: int, vocabulary: int, dtype: str) -> None:
    """A random model in the format of LLaDA's release, with the tokenizer of characters."""
    import torch
    from safetensors.torch import save_file

    from dqbench.text.tokenizer import character_tokenizer

    folder.mkdir()
    tokenizer, generator = character_tokenizer(), torch.Generator().manual_seed(0)
    weight_map = {}
    for file, own in shapes(layers, d, vocabulary).items():
        tensors = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / shape[1] ** 0.5
            for name, shape in own.items()
        }
        save_file(
            {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}, folder / f"{file}.safetensors"
        )
        weight_map |= dict.fromkeys(own, f"{file}.safetensors")
    config = {"model_type": "llada", "d_model": d, "n_layers": layers, "n_heads": 8, "mlp_hidden_size": 3 * d}
    config |= {
        "vocab_size": vocabulary,
        "embedding_size": vocabulary,
        "weight_tying": False,
        "max_sequence_length": 4096,
    }
    config |= {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id, "rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tokenizer.save_pretrained(folder)


def overrides(root: Path, given: dict[str, str]) -> list[str]:
    """The arguments of both ways."""
    size = int(given["rows"]) * int(given["length"])
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * (size // 20))
    named = ["model=llada_8b_base", f"model.path={root / 'model'}", f"model.data={root / 'text.txt'}"]
    named += [f"model.prompts={root / 'text.txt'}", f"model.dtype={given['dtype']}", f"method={given['method']}"]
    named += [f"bits={given['bits']}", f"calib.samples={given['rows']}", f"calib.mask.length={given['length']}"]
    return [*named, "metrics=none", "tracking=none", "runtime.device=cpu", f"paths.results={root / 'results'}"]


def in_memory(arguments: list[str]) -> None:
    """Quantize as a cell does and print {"peak", "start"}: bytes of memory."""
    from dqbench.config import compose
    from dqbench.resources import peak_memory, restart_peak
    from dqbench.run import Cell
    from dqbench.text import streamed  # noqa: F401 (what both ways import is in use before)

    restart_peak()
    start = peak_memory()
    cell = Cell(compose(arguments))
    cell.quantize(cell.calibrate())
    print(json.dumps({"peak": peak_memory(), "start": start}))


def child(arguments: list[str]) -> list[str]:
    """What a process of its own prints, line by line."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()


def measure(given: dict[str, str]) -> dict[str, Any]:
    """Bytes of memory of both ways: their peaks above what was in use before, a layer, its inputs, the network."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make(root / "model", int(given["layers"]), int(given["hidden"]), int(given["vocabulary"]), given["dtype"])
        arguments = overrides(root, given)
        child(["-m", "dqbench.export", *arguments, f"to={root / 'packed'}", f"json={root / 'streamed.json'}"])
        found = json.loads((root / "streamed.json").read_text())
        memory = found["memory"]
        cell = json.loads(child(["-m", "bench.streamed", "in_memory", *arguments])[-1])
    return {
        "streamed": memory["peak"] - memory["start"],
        "in_memory": cell["peak"] - cell["start"],
        "imports": memory["start"],
        **{key: memory[key] for key in ("layer", "calibration", "network")},
        "packed_file": found["sizes"]["denoiser"]["file_bytes"],
        "bits_per_weight": found["origin"]["cost"]["bits_per_weight"],
    }


def bench(quick: bool) -> tuple[list[Ratio], dict]:
    """Peak memory above imports, layer by layer over in memory."""
    found = measure(DEFAULTS | ({"layers": "4", "hidden": "512"} if quick else {}))
    detail = ", ".join(f"{key} {found[key] / 1e6:.0f} MB" for key in ("streamed", "in_memory", "layer", "network"))
    value = found["streamed"] / found["in_memory"]
    return [Ratio("a random LLaDA, peak memory: layer by layer / in memory", value, AT_MOST, TARGET, detail)], found


def main(argv: list[str]) -> None:
    """Measure and print; with json=PATH also write that there."""
    if argv[:1] == ["in_memory"]:
        return in_memory(argv[1:])
    pairs, target = split_json(argv)
    given = dict(pair.partition("=")[::2] for pair in pairs)
    if unknown := sorted(given.keys() - DEFAULTS.keys()):
        raise UserError(f"{unknown[0]} is unknown; allowed: {', '.join(DEFAULTS)}, json")
    found = measure(DEFAULTS | given)
    print("\n".join(f"{key:<16} {value:,}" for key, value in found.items()))
    if target:
        target.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    command(main)()
