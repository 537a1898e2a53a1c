"""Measured tables of quantisation, pruning and distillation; each function returns Markdown."""

from collections.abc import Sequence

from result_files import above, bpb, fewer, figure, grid, machine, percent, read, source, spread, times

SEEDS = ["seed 0", "seed 1", "seed 2"]


def quantize_quality() -> str:
    costs, rows = read("quantize_quality")["cost_share"], []
    for key, name, compared in (
        ("int8", "int8 matrices", False),
        ("int8, int8 activations", "int8 matrices, int8 activations", False),
        ("int8 cache", "int8 cache", False),
        ("int4 cache", "int4 cache", False),
        ("int4", "int4:g32, rounded", True),
        ("int4, awq", "int4:g32, AWQ without clips", True),
        ("int4, gptq", "int4:g32, GPTQ", True),
        ("trained int4", "int4:g32, trained over the last tenth", True),
        ("trained int4-fixed-steps", "the same, without learned steps", True),
    ):
        recovered = [f"{100 * (1 - cost / of):.0f}" for cost, of in zip(costs[key], costs["int4"], strict=True)]
        rows.append([name, *map(percent, costs[key]), ", ".join(recovered) + " %" if compared else ""])
    header = ["", *SEEDS, "recovered of the loss by rounding"]
    baseline = spread(bpb("quantize_quality", "float"))
    return f"""{grid(header, rows)}

The float models have {baseline} bits per byte.
{source("quantize_quality")}"""


def quantize_decoding() -> str:
    stored = read("quantize")["decoding"]
    base, rows = stored["float32"], []
    for name in ("float32", "bfloat16", "int8", "int8, int8 activations", "int4:g32"):
        speeds = [
            f"{stored[name][k]:.0f} ({stored[name][k] / base[k]:.2f})" for k in ("tokens_per_s_b1", "tokens_per_s_b8")
        ]
        rows.append([name, f"{stored[name]['bytes'] / base['bytes']:.2f}", *speeds])
    return f"{grid(['stored', 'bytes of the model', 'batch 1', 'batch 8'], rows)}\n{source('quantize')}"


def quantize_products() -> str:
    products = read("quantize")["products"]
    rows = [
        [name, *(f"{products[name][f'us_{n}_rows']:.0f}" for n in (1, 8, 128))]
        for name in ("float32", "int8 x int8 to int32")
    ]
    return f"{grid(['microseconds per product', '1 row', '8 rows', '128 rows'], rows)}\n{source('quantize')}"


def quantize_memory() -> str:
    memory, rows = read("quantize")["memory"], []
    whole = memory["float32"]["checkpoint_bytes"]
    for key, name in (
        ("float32", "loaded the float32 model"),
        ("int8", "loaded the int8 model"),
        ("int4:g32", "loaded the int4:g32 model"),
        ("converting, nearest", "converted it by rounding"),
        ("converting, gptq", "converted it by GPTQ, 128 rows"),
    ):
        of = memory[key]
        share = f"{of['checkpoint_bytes'] / whole:.2f}" if "checkpoint_bytes" in of else ""
        rows.append(
            [name, f"{of['live_array_bytes'] / 1e6:.0f} MB", f"{of['peak_resident_bytes'] / 1e6:,.0f} MB", share]
        )
    header = ["a process that has", "arrays at the end", "resident at most", "checkpoint, over float32"]
    return f"{grid(header, rows)}\n{source('quantize')}"


def quantize_conversion() -> str:
    seconds = read("quantize")["conversion_s_per_100M"]
    rows = [[name, f"{seconds[key]:.0f}"] for key, name in (("nearest", "rounding"), ("gptq", "GPTQ"), ("awq", "AWQ"))]
    return f"{grid(['method', 'seconds per 100M parameters'], rows)}\n{source('quantize')}"


def prune_quality() -> str:
    seeds = list(read("prune_quality")["seeds"].values())
    trained, loaded = bpb("prune_quality", "dense"), [seed["at_once"]["dense"] for seed in seeds]
    whole, rows = figure("prune_quality", "dense", "parameters_total"), []
    for key, name in (("sparse", "50 % while training"), ("sparse-2of4", "2:4 while training")):
        rows.append([name, "", *above(bpb("prune_quality", key), trained), "the same tokens"])
    for pattern, share in (("half", "50 %"), ("2of4", "2:4")):
        for key, name in (("magnitude", "magnitude"), ("wanda", "Wanda"), ("sparsegpt", "SparseGPT")):
            pruned = [seed["at_once"][f"{pattern}, {key}"] for seed in seeds]
            rows.append([f"{share} at once, {name}", "", *above(pruned, loaded), "no training"])
    for key, name, training in (
        ("magnitude", "50 % by magnitude, then trained", "10 % more tokens"),
        ("magnitude-3rounds", "the same in three rounds", "10 % more tokens"),
        ("width33", "cut in width", "10 % more tokens"),
        ("width33-scratch", "that shape, trained on these tokens alone", "10 % of the tokens"),
        ("depth28", "cut in depth, 4 of 6 layers", "10 % more tokens"),
        ("width50-2rounds", "cut in width, two rounds", "10 % more tokens"),
    ):
        tuned = [seed["tuned"][key] for seed in seeds]
        left = tuned[0]["parameters_total"] / whole
        rows.append(
            [name, "" if left == 1 else f"{100 * left:.0f} %", *above([t["bpb"] for t in tuned], loaded), training]
        )
    return f"""{grid(["", "parameters left", *SEEDS, "training"], rows)}

The dense models have {spread(trained)} bits per byte.
{source("prune_quality")}"""


def prune_latency() -> str:
    fields = ("prefill_s_b1", "prefill_s_b8", "decode_s_per_token_b1", "decode_s_per_token_b8")
    seed, bench, rows = read("prune_quality")["seeds"]["0"], read("prune")["latency"], []
    whole = figure("prune_quality", "dense", "parameters_total")
    for key, name in (("width33", "width"), ("depth28", "depth"), ("width50-2rounds", "width, two rounds")):
        left = seed["tuned"][key]["parameters_total"] / whole
        ratios = times(seed["latency"]["dense"][field] / seed["latency"][key][field] for field in fields)
        rows.append([f"{whole / 1e6:.1f}M parameters (seed 0), {name}", f"{100 * left:.0f} %", *ratios])
    whole = bench["whole"]["parameters"]
    for name in ("width", "depth"):
        ratios = times(bench[f"speedup, {name}"][field] for field in fields)
        rows.append(
            [f"{whole / 1e6:.0f}M parameters, {name}", f"{100 * bench[name]['parameters'] / whole:.0f} %", *ratios]
        )
    header = ["times as fast as the dense model", "left", "prompt, 1 row", "8 rows", "a token, 1 row", "8 rows"]
    return f"{grid(header, rows)}\n{source('prune_quality', 'prune')}"


def prune_clock() -> str:
    result = read("prune")
    steps, rows = result["step_s"], []
    for key, name in (
        ("dense", "dense step"),
        ("magnitude", "sparse step between updates of the masks"),
        ("straight through", "straight-through step between updates"),
        ("magnitude, with an update", "sparse step that updates the masks"),
        ("straight through, with an update", "straight-through step that updates the masks"),
    ):
        rows.append([name, f"{steps[key]:.2f}", f"{steps[key] / steps['dense']:.2f}"])
    for key, name in (("magnitude", "magnitude"), ("wanda", "Wanda"), ("sparsegpt", "SparseGPT")):
        rows.append([f"100M parameters at once, {name}", f"{result['at_once_s_per_100M'][f'half, {key}']:.0f}", ""])
    return f"{grid(['', 'seconds', 'over the dense step'], rows)}\n{source('prune')}"


def distill_quality() -> str:
    result = read("distill_quality")
    short, long, rows = result, result["2000_steps"], []
    for of, key, name in (
        (long, "text", "the text alone, 2,000 steps = 8.2M tokens, 9,600 rows"),
        (long, "text-fresh", "the text alone, 2,000 steps, 32,000 rows"),
        (long, "samples", "50 samples of the teacher, 2,000 steps, 9,600 rows"),
        (short, "text", "the text alone, 500 steps"),
        (short, "samples", "50 samples of the teacher, 500 steps"),
        (short, "samples-70", "the same, 350 steps (70 % of the tokens)"),
        (short, "samples-short", "the same, 200 steps"),
        (short, "online-short", "the teacher beside every batch, 200 steps"),
    ):
        kept = ", ".join(f"{100 * share:.0f}" for share in of["kept_share_of_gain"][key])
        rows.append([name, *(f"{value:.3f}" for value in of["bpb"][key]), f"{kept} %"])
    samples, beside = short["bpb"]["samples-short"], short["bpb"]["online-short"]
    repeated, fresh = (fewer(long["bpb"]["samples"], long["bpb"][text]) for text in ("text", "text-fresh"))
    return f"""{grid(["student", *SEEDS, "share of the teacher's gain over a unigram model"], rows)}

The teacher has {result["teacher_bpb"]:.3f} bits per byte, a unigram model {result["unigram_bpb"]:.3f}. With 2,000 steps
the student needs {repeated} % fewer bits than on the text alone, and {fresh} % fewer than on text of
which no row comes twice (seeds 0, 1, 2). Training on the cached samples ends within {fewer(beside, samples, 2)} % of
training with the teacher beside every batch (200 steps).

Source: [distill_quality.json](RESULTS/distill_quality.json), which has the command and the commit of each part;
{machine(result["environment"])}."""


def distill_starts() -> str:
    return _per_seed(
        "begins",
        {
            "at random, 3 layers": "random, half of the layers",
            "with 3 of the teacher's 6 layers": "layers of the teacher",
            "at random, 6 narrower layers": "random, narrower",
            "cut out of the teacher in width": "cut in width",
        },
    )


def _per_seed(title: str, keys: dict[str, str]) -> str:
    starts = read("distill_quality")["starts_bpb"]
    return grid([title, *SEEDS], [[name, *(f"{value:.3f}" for value in starts[key])] for name, key in keys.items()])


def distill_recovery() -> str:
    recovery = {
        name: list(of.values()) for name, of in read("distill_quality")["recovery"].items() if name != "command"
    }
    rows = [
        ["with `--distill`", *above(recovery["bpb"], recovery["dense"])],
        ["without", *above(recovery["without_distillation"], recovery["dense"])],
    ]
    return grid(["a third cut in width", *SEEDS], rows)


def distill_clock() -> str:
    result = read("distill")
    plain = result["step_s"]["plain"]
    chunked, naive = (f"{result['loss_bytes_at_32k'][key] / 1e6:,.0f}" for key in ("chunked", "naive"))
    rows = [[name, f"{seconds:.2f}", f"{seconds / plain:.2f}"] for name, seconds in result["step_s"].items()]
    return f"""{grid(["step", "seconds", "over the plain step"], rows)}

The step with a teacher takes {result["ratio"]:.2f} of the plain step and the teacher's forward pass together. A loss on
4,096 tokens and 32k entries takes {chunked} MB of temporaries, with all logits {naive} MB.
{source("distill")}"""


def task_distill() -> str:
    result, rows = read("task_distill"), []
    for key, name, note in (
        ("teacher", "teacher, tuned from a general model", ""),
        ("student", "its student", ""),
        ("student, 8 bits", "its student in 8 bits", ""),
        ("plain student", "the same student without a teacher", ""),
        ("general, probe", "the general model, linear probe", ""),
        ("general, few-shot", "the general model, examples in its prompt (300 questions)", ", busy machine"),
    ):
        of = result["models"][key]
        stored = of["bytes"]["mean"] / 1e6
        rows.append([name, _distinct([f"{100 * value:.1f}" for value in of["accuracy"]["values"]])])
        rows[-1] += [
            f"{of['parameters']['mean'] / 1e6:.2f}M",
            f"{stored:.1f} MB" if stored > 10 else f"{stored:.2f} MB",
        ]
        rows[-1].append(f"{_two_digits(1e3 * of['latency_s']['mean'])} ms{note}")
    first = {name: f"{100 * of['accuracy']:.1f} %" for name, of in result["earlier_try"]["models"].items()}
    return f"""{grid(["model", "accuracy, %", "parameters", "bytes", "a question"], rows)}

`alpha` and the teacher's steps were set after a first try with seed 0 (alpha 0.9, 400 steps: teacher
{first["teacher"]}, student {first["student"]}) that had been scored on the test.
{source("task_distill")}"""


def _distinct(values: Sequence[str]) -> str:
    return ", ".join(values if len(set(values)) > 1 else values[:1])


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value > 10 else f"{value:#.2g}"
