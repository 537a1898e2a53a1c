"""Measured tables of mixture of experts and adaptive depth; each function returns Markdown."""

from result_files import bpb, figure, grid, read, source, spread, times


def moe_quality() -> str:
    rows = []
    for variant, name in (
        ("moe", "mixture, 2 of 8 experts of 256"),
        ("dense", "dense, the same active parameters"),
        ("dense-wide", "dense, wider, twice the FLOPs"),
    ):
        flops = figure("moe_quality", variant, "train_flops") / 1e12
        active, total = (f"{figure('moe_quality', variant, f'parameters_{k}') / 1e6:.2f}M" for k in ("active", "total"))
        rows.append([name, spread(bpb("moe_quality", variant)), f"{flops:.1f}", active, total])
    result = read("moe_quality")
    wide = [of - value for value, of in zip(bpb("moe_quality", "moe"), bpb("moe_quality", "dense-wide"), strict=True)]
    return f"""{grid(["model", "bits per byte", "training TFLOP", "active parameters", "all parameters"], rows)}

On the same tokens the mixture is {result["gain_bpb"]:.3f} ± {result["gain_bpb_sd"]:.3f} bits per byte better than the
dense model of its FLOPs, and {sum(wide) / len(wide):.3f} ({min(wide):.3f} to {max(wide):.3f}) better than the one that
spends twice as many.
{source("moe_quality")}"""


def moe_clock() -> str:
    result = read("moe")
    rows = []
    for name, seconds in result["step_s"].items():
        ratio = f"{result['ratios'].get(name, 1):.2f}"
        rows.append([f"`{name}`" if name in result["ratios"] else name, f"{seconds:.2f}", ratio])
        rows[-1].append(f"{result['temporary_bytes'][name] / 1e9:.2f} GB")
    excess = {name: f"{100 * of['unseen, all']:.0f} %" for name, of in result["max_violation"].items()}
    return f"""{grid(["dispatch", "seconds per step", "over the dense step", "temporary memory"], rows)}

After 500 steps the fullest expert has {excess["with_bias"]} more than the mean load on unseen text; without the bias it
has {excess["without"]} more.
{source("moe")}"""


ADAPTIVE = (
    ("plain", "adaptive_depth_layerskip", "plain"),
    ("layerskip", "adaptive_depth_layerskip", "layerskip"),
    ("mixture of depths, 25 % in every second block", "adaptive_depth_mixture", "mixture-of-depths"),
    ("recursion, 1, 2/3, 1/3 of the tokens, one seed", "adaptive_depth_recursion", "recursion"),
)


def adaptive_quality() -> str:
    rows = []
    for name, result, variant in ADAPTIVE:
        figures = read(result)["variants"][variant]
        ahead = f"{figures['bpb_look_ahead']['mean']:.3f}" if "bpb_look_ahead" in figures else ""
        blocks = 1 if variant == "plain" else read(result)["forward_flops_share"]
        whole = figure(result, variant, "train_flops_per_token") / figure(result, "plain", "train_flops_per_token")
        parameters = f"{figure(result, variant, 'parameters_total') / 1e6:.2f}M"
        rows.append([name, spread(bpb(result, variant)), ahead, f"{blocks:.2f} ({whole:.2f})", parameters])
    skip, mixture = read("adaptive_depth_layerskip"), read("adaptive_depth_mixture")
    tokens = figure("adaptive_depth_mixture", "mixture-of-depths", "train_tokens")
    more = tokens / figure("adaptive_depth_mixture", "plain", "train_tokens") - 1
    header = [
        "model",
        "bits per byte",
        "as trained, looking ahead",
        "FLOPs to read a token (with the head)",
        "parameters",
    ]
    return f"""{grid(header, rows)}

Layer dropout and early exits cost the last layer {100 * skip["cost_share"]:.2f} % of the bits per byte
({skip["cost_bpb"]:.4f} ± {skip["cost_bpb_sd"]:.4f}), compared with the same run in which they are switched off. The
mixture of depths reads {100 * more:.0f} % more tokens for the same training FLOPs, and is
{mixture["gain_bpb"]:.3f} ± {mixture["gain_bpb_sd"]:.3f} bits per byte better than the plain model.
{source("adaptive_depth_layerskip", "adaptive_depth_mixture", "adaptive_depth_recursion")}"""


def speculation() -> str:
    result = read("adaptive_depth")
    rows = [
        ["times as fast as plain decoding", *times(result["speedups"])],
        ["share of the drafts accepted", *(f"{100 * share:.0f} %" for share in result["acceptance"])],
    ]
    header = ["self-speculation, batch 1, greedy, the head included", "seed 0", "seed 1", "seed 2"]
    return f"{grid(header, rows)}\n{source('adaptive_depth')}"


def routed_decoding() -> str:
    fields = ("decode_s_per_token_b1", "decode_s_per_token_b8", "prefill_s_b1", "prefill_s_b8")
    rows = [
        [name.replace("-", " "), *times(1e3 * seconds[field] for field in fields)]
        for name, seconds in read("adaptive_depth")["routed_seconds"].items()
    ]
    header = ["milliseconds", "a token, batch 1", "a token, batch 8", "128 tokens read", "eight rows of them"]
    return f"{grid(header, rows)}\n{source('adaptive_depth')}"


def exits() -> str:
    run = read("adaptive_depth")["runs"]["0"]
    clocks = [run["exit_seconds"][f"batch {n}"] for n in (1, 8)]

    def row(name: str, key: str, layers: str, found: dict[str, float]) -> list[str]:
        latencies = [f"{ms} ms" for ms in times(1e3 * clock[key]["s_per_token"] for clock in clocks)]
        return [name, layers, f"{found['bpb']:.3f}", f"{100 * found['differs']:.1f} %", *latencies]

    rows = [row("all layers", "all layers", "8", run["exits"]["probe"]["curve"][0])]
    for key in ("similarity", "gap", "probe"):
        found = run["exits"][key]["within_1_percent"]
        rows.append(row(f"exit by {key}", key, f"{found['mean_depth']:.2f} of 8", found))
    header = ["", "layers", "bits per byte", "other tokens", "a token, batch 1", "batch 8"]
    return f"{grid(header, rows)}\n{source('adaptive_depth')}"
