"""Tables across techniques: what each one gave, its speed, near duplicates; each function returns Markdown."""

from result_files import bpb, fewer, figure, grid, percent, read, source, step_ratio, times


def speed() -> str:
    moe, depth, quantize, prune, distill = map(read, ("moe", "adaptive_depth", "quantize", "prune", "distill"))
    first, cached = depth["runs"]["0"], distill["cached_ratio"]
    parts = distill["step_s"]["plain"] + distill["step_s"]["teacher forward"]
    learned, integers = (
        step_ratio(quantize, k, "plain") for k in ("int4:g32, learned steps", "int8, int8 activations")
    )
    rows = [
        (
            "step of a mixture, 2 of 8 experts, over that of a dense model of equal active FLOPs",
            f"{moe['step_s']['blocks']:.2f} s",
            f"dense: {moe['step_s']['dense']:.2f} s",
            f"{moe['ratios']['blocks']:.2f} (`blocks`), {moe['ratios']['capacity']:.2f} (`capacity`)",
            f"up to {moe['goal']}",
            "moe.py",
        ),
        (
            "self-speculation, 8 layers, d=128, batch 1, head included",
            f"{first['tokens_per_s']:,.0f} tokens/s",
            f"plain decoding: {first['plain_tokens_per_s']:,.0f} tokens/s (seed 0)",
            f"{depth['ratio']:.2f}, the median of three seeds; the same tokens",
            f"{depth['goal']}",
            "adaptive_depth.py",
        ),
        (
            "training for 4 bits over plain training, 6 layers, d=384",
            f"{quantize['step_s']['int4:g32']:.2f} s",
            f"plain: {quantize['step_s']['plain']:.2f} s",
            f"{quantize['ratio']:.2f}; learned steps {learned}, int8 both sides {integers}",
            f"up to {quantize['goal']}",
            "quantize.py",
        ),
        (
            "sparse training over dense training, 6 layers, d=384",
            f"{prune['step_s']['magnitude']:.2f} s",
            f"dense: {prune['step_s']['dense']:.2f} s",
            f"{step_ratio(prune, 'magnitude', 'dense')} between updates of the masks; straight-through "
            f"{step_ratio(prune, 'straight through', 'dense')}",
            f"up to {prune['goal']}",
            "prune.py",
        ),
        (
            "step with a teacher beside it, over a plain step and the teacher's forward pass",
            f"{distill['step_s']['with teacher']:.2f} s",
            f"the sum: {parts:.2f} s",
            f"{distill['ratio']:.2f}; from a cache, over plain: {cached['cached, top 64']:.2f} (top 64), "
            f"{cached['cached, 50 samples']:.2f} (50 samples)",
            f"up to {distill['goal']}",
            "distill.py",
        ),
    ]
    lines = [[*row[:-1], f"`python tests/bench/{row[-1]}`"] for row in rows]
    header = ["what", "efftrain", "compared with", "ratio", "goal", "command"]
    return f"{grid(header, lines)}\n{source('moe', 'adaptive_depth', 'quantize', 'prune', 'distill')}"


def near_duplicates() -> str:
    rates, tools = read("near_duplicates")["rates"], ("efftrain", "datatrove", "datasketch")
    rows = []
    for key in rates:
        if key.startswith("J ") and (low := float(key[2:-1])) >= 0.75:
            rows.append(
                [f"found, similarity {low:.2f} to {low + 0.05:.2f}", *(f"{rates[key][tool]} %" for tool in tools)]
            )
    different = [of for key, of in rates.items() if key.startswith("not: ")]
    name = f"wrongly removed, the worst of {len(different)} kinds of template and boilerplate"
    rows.append([name, *(f"{max(of[tool] for of in different)} %" for tool in tools)])
    return f"{grid(['planted pairs', *tools], rows)}\n{source('near_duplicates')}"


def techniques() -> str:
    """The table of the top README."""
    rows = [
        (
            "[Mixture of experts](recipes/moe.md)",
            f"{mean_fewer('moe_quality', 'moe', 'dense')} fewer bits per byte than a dense model of equal FLOPs",
            "python recipes/moe.py cpu --compare dense",
        ),
        (
            "[Mixture of depths](recipes/adaptive-depth.md)",
            f"{mean_fewer('adaptive_depth_mixture', 'mixture-of-depths', 'plain')} fewer bits at equal training FLOPs, "
            f"{flops_saved()} fewer FLOPs per token",
            "python recipes/adaptive_depth.py mixture-of-depths --compare plain",
        ),
        (
            "[Self-speculation](recipes/adaptive-depth.md)",
            f"the same tokens {', '.join(times(read('adaptive_depth')['speedups']))} times as fast",
            "efftrain calibrate-depth RUN",
        ),
        ("[Early exits](recipes/adaptive-depth.md)", early_exits(), "efftrain calibrate-depth RUN"),
        (
            "[4 bits, trained](recipes/quantization.md)",
            f"{costs('trained int4')} more bits than float32",
            "python recipes/qat.py cpu --compare",
        ),
        (
            "[4 bits, GPTQ](recipes/quantization.md)",
            f"{costs('int4, gptq')} more bits, no training",
            "efftrain compress quantize RUN --weights int4:g32 --method gptq",
        ),
        (
            "[8 bits, both sides](recipes/quantization.md)",
            f"decodes {int8_speeds()} times as fast (batch 1, 8); {costs('int8, int8 activations')} more bits",
            "efftrain compress quantize RUN --weights int8 --activations int8",
        ),
        (
            "[Sparse training](recipes/pruning.md)",
            f"half of the weights zero: {sparse_cost()} more bits; not faster",
            "python recipes/prune.py cpu --compare",
        ),
        (
            "[Structured pruning](recipes/pruning.md)",
            f"a third fewer parameters: {cut_cost()} more bits; reads {cut_speeds()} times as fast (batch 1, 8)",
            "efftrain compress structured RUN --ratio 0.33 --recovery-tokens 400000",
        ),
        (
            "[Distillation](recipes/distillation.md)",
            taught(),
            "python recipes/distill.py cpu --compare",
        ),
        (
            "[Task distillation](recipes/task-distillation.md)",
            task(),
            "python recipes/task_distill.py banking77 --compare",
        ),
        (
            "[Near duplicates](data/README.md)",
            duplicates(),
            "python tests/bench/near_duplicates.py",
        ),
    ]
    return grid(["technique (guide)", "what it gave", "command"], [[*row[:-1], f"`{row[-1]}`"] for row in rows])


def mean_fewer(result: str, variant: str, base: str) -> str:
    values, of = bpb(result, variant), bpb(result, base)
    return f"{100 * (1 - sum(values) / sum(of)):.1f} %"


def flops_saved() -> str:
    result = "adaptive_depth_mixture"
    share = figure(result, "mixture-of-depths", "train_flops_per_token") / figure(
        result, "plain", "train_flops_per_token"
    )
    return f"{100 * (1 - share):.0f} %"


def early_exits() -> str:
    run = read("adaptive_depth")["runs"]["0"]
    ratios = [
        clock["all layers"]["s_per_token"] / clock["probe"]["s_per_token"]
        for clock in (run["exit_seconds"][f"batch {n}"] for n in (1, 8))
    ]
    curve, found = run["exits"]["probe"]["curve"], run["exits"]["probe"]["within_1_percent"]
    more = percent(found["bpb"] / curve[0]["bpb"] - 1)
    return f"{', '.join(times(ratios))} times as fast (batch 1, 8); {more} more bits"


def costs(name: str) -> str:
    return between(read("quantize_quality")["cost_share"][name])


def between(shares: list[float]) -> str:
    low, high = (f"{100 * of:.2f}" for of in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def int8_speeds() -> str:
    stored = read("quantize")["decoding"]
    fields = ("tokens_per_s_b1", "tokens_per_s_b8")
    return ", ".join(times(stored["int8, int8 activations"][field] / stored["float32"][field] for field in fields))


def sparse_cost() -> str:
    pairs = zip(bpb("prune_quality", "sparse"), bpb("prune_quality", "dense"), strict=True)
    return between([value / of - 1 for value, of in pairs])


def cut_cost() -> str:
    seeds = read("prune_quality")["seeds"].values()
    return between([seed["tuned"]["width33"]["bpb"] / seed["at_once"]["dense"] - 1 for seed in seeds])


def cut_speeds() -> str:
    latency = read("prune_quality")["seeds"]["0"]["latency"]
    fields = ("prefill_s_b1", "prefill_s_b8")
    return ", ".join(times(latency["dense"][field] / latency["width33"][field] for field in fields))


def taught() -> str:
    long = read("distill_quality")["2000_steps"]["bpb"]
    repeated, fresh = (fewer(long["samples"], long[text]) for text in ("text", "text-fresh"))
    return f"{repeated} % fewer bits than the text alone; {fresh} % where no text repeats"


def task() -> str:
    models = read("task_distill")["models"]
    share = models["student"]["parameters"]["mean"] / models["teacher"]["parameters"]["mean"]
    student, teacher, plain = (
        f"{100 * models[name]['accuracy']['mean']:.1f} %" for name in ("student", "teacher", "plain student")
    )
    small = f"{100 * share:.0f} % of the teacher's parameters"
    return f"{student} accuracy with {small} (teacher {teacher}, no teacher {plain})"


def duplicates() -> str:
    rates = read("near_duplicates")["rates"]
    found = [of["efftrain"] for key, of in rates.items() if key.startswith("J ") and float(key[2:-1]) >= 0.75]
    removed = [of["efftrain"] for key, of in rates.items() if key.startswith("not: ")]
    return f"{min(found)} to {max(found)} % of planted pairs found, {max(removed)} % of templates removed"
