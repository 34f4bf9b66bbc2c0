"""FP8 on several ranks: law 1 within the format's own error, one scale for a tensor however it is cut, law 2, reports.

The format's own error is how far one rank's gradient in FP8 is from the same rank's in fp32.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megavid import checkpoint
from megavid.checkpoint.convert import open_model
from megavid.checkpoint.convert.job import ConvertJob, ConvertRequest
from megavid.checkpoint.convert.saved import saved_tensors
from megavid.checkpoint.convert.shards import OpenFiles
from megavid.config.load import dump_toml
from megavid.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from megavid.errors import ConfigError
from megavid.models import fp8 as models_fp8
from megavid.models.fp8 import Fp8Scaling, scalings_of, update_histories
from megavid.models.runner import build_engine
from megavid.ops.compiled import why_not_compiled
from megavid.ops.fp8 import E4M3, E5M2, RELATIVE_ERROR
from megavid.ops.fp8_linear import Recipe, RecipeName
from megavid.ops.fp8_ops import COMPILED_FP8, REFERENCE_FP8
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.fp8_figures import figures_of, watching, worst_rounding
from megavid.training.resume import resume
from megavid.training.state import TrainState
from tests.support.newest import newest_too
from tests.support.ranks import RankPool
from tests.support.tiny_world import (
    assemble,
    held,
    initialize,
    load_and_train,
    take_step,
    tiny_config,
    train,
    train_and_save,
    with_parallel,
)

WIDTHS: dict[str, int] = {"tensorwise": 64, "delayed": 64, "blockwise": 256, "mxfp8": 64}
HISTORY: dict[str, dict[str, int]] = {"delayed": {"fp8_history": 4}}
FORMAT_SHARE = 0.2
"""Gap of a gradient between two layouts over the format's own error of it."""
LAYOUTS = {
    "wan tensorwise tp2": ("wan", "tensorwise", 2, {"tensor": 2}),
    "wan tensorwise cp2 tp2 without sp": ("wan", "tensorwise", 4, {"context": 2, "tensor": 2, "sequence": False}),
    "wan tensorwise dp2 pp2 full": ("wan", "tensorwise", 4, {"pipeline": 2, "recompute": "full"}),
    "moe tensorwise tp2 ep2 etp2": ("wan_moe", "tensorwise", 4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "moe tensorwise tp2, scales of experts by rank": ("wan_moe", "tensorwise", 2, {"tensor": 2}),
    "moe tensorwise cp2, scales of experts by rank": ("wan_moe", "tensorwise", 2, {"context": 2}),
    "moe delayed cp2 ep2": ("wan_moe", "delayed", 4, {"context": 2, "expert": 2, "recompute": "selective"}),
    "moe delayed pp2 vpp2 dp2": ("wan_moe", "delayed", 4, {"pipeline": 2, "virtual_pipeline": 2}),
    "wan blockwise tp2": ("wan", "blockwise", 2, {"tensor": 2}),
    "moe mxfp8 tp2 ep2": ("wan_moe", "mxfp8", 2, {"tensor": 2, "expert": 2}),
    "attention tp2 full": ("wan", "tensorwise, attention", 2, {"tensor": 2, "recompute": "full"}),
    "attention cp2 ulysses selective": (
        "wan", "tensorwise, attention", 2, {"context": 2, "context_strategy": "ulysses", "recompute": "selective"},
    ),
    "attention cp2 ring": ("wan", "tensorwise, attention", 2, {"context": 2, "context_strategy": "ring"}),
    "attention cp4 hybrid": ("wan", "tensorwise, attention", 4, {"context": 4, "context_strategy": "hybrid"}),
}  # fmt: skip
REFERENCES: dict[str, Any] = {}


def fp8_config(family: str, recipe: str, *, width: int = 0, **options: Any) -> RunConfig:
    """The tiny model, wide enough for the recipe's tiles; of its four blocks the inner two are in FP8.

    A recipe is a value of ``precision.fp8``, with attention where it ends with that.
    """
    recipe, *rest = recipe.split(", ")
    width = width or WIDTHS[recipe]
    config = tiny_config(family, moe={"expert_ffn_size": width, "shared_ffn_size": width}, **options)
    model = replace(config.model, hidden_size=width, ffn_size=2 * width)
    precision = PrecisionConfig(fp8=recipe, fp8_attention=bool(rest), **HISTORY.get(recipe, {}))
    return replace(config, model=model, precision=precision)


def gradient_of(told: list[dict[str, Any]]) -> torch.Tensor:
    """The whole gradient of the first step (times a constant), in the order of names."""
    whole = assemble([rank["first"] for rank in told])
    return torch.cat([whole[name].reshape(-1) for name in sorted(whole)])


def on_one_rank(pool: RankPool, family: str, recipe: str, width: int) -> Any:
    key = f"{family} {recipe} {width}"
    if key not in REFERENCES:
        REFERENCES[key] = pool.run(1, train, fp8_config(family, recipe, width=width), 1)
    return REFERENCES[key]


@pytest.mark.parametrize("name", newest_too(LAYOUTS, "moe tensorwise tp2 ep2 etp2"))
def test_layouts_differ_by_a_part_of_the_format_s_own_error(pool: RankPool, name: str) -> None:
    family, recipe, world, options = LAYOUTS[name]
    width = WIDTHS[recipe.split(", ")[0]]
    wide, alone = (on_one_rank(pool, family, kind, width) for kind in ("off", recipe))
    ranks = pool.run(world, train, fp8_config(family, recipe, **options), world)
    exact, narrow, cut = (gradient_of(told) for told in (wide, alone, ranks))
    own_error = float((narrow - exact).norm() / exact.norm())
    gap = float((cut - narrow).norm() / narrow.norm())
    assert 1e-3 < own_error < 0.2, f"in FP8 the gradient is {own_error:.1e} off"
    assert gap <= FORMAT_SHARE * own_error, f"{gap:.1e} between layouts, {own_error:.1e} to fp32"
    if recipe.endswith("attention"):  # of attention's own part too, which is little beside that of the matrices
        matrices = gradient_of(on_one_rank(pool, family, recipe.split(", ")[0], width))
        assert (cut - narrow).norm() <= FORMAT_SHARE * (narrow - matrices).norm()
    assert ranks[0]["loss"] == pytest.approx(alone[0]["loss"], rel=5e-3)


def test_attention_in_fp8_is_wired(pool: RankPool) -> None:
    wide, matrices, attention = (
        on_one_rank(pool, "wan", recipe, WIDTHS["tensorwise"])
        for recipe in ("off", "tensorwise", "tensorwise, attention")
    )
    exact, narrow, narrower = (gradient_of(told) for told in (wide, matrices, attention))
    assert all(one != other for one, other in zip(attention[0]["loss"], matrices[0]["loss"]))
    assert attention[0]["loss"] == pytest.approx(wide[0]["loss"], rel=2e-2)
    # Beside what matrices lose it is little: in this small a model attention is nearly even.
    assert 1e-3 < (narrower - narrow).norm() / narrow.norm() < 0.1
    assert (narrower - exact).norm() < 1.5 * (narrow - exact).norm()


def test_attention_in_fp8_survives_a_resume_bitwise(pool: RankPool, tmp_path: Path) -> None:
    config = fp8_config("wan", "tensorwise, attention", context=2, context_strategy="ring", recompute="selective")
    straight = pool.run(2, train_and_save, config, 2, str(tmp_path), 3, 2)
    resumed = pool.run(2, load_and_train, config, 2, str(tmp_path), 3, 2)
    for key in ("loss", "norm"):
        assert [told[key] for told in resumed] == [told[key] for told in straight]


@pytest.mark.parametrize("options", [{"tensor": 2, "expert": 2}, {"context": 2, "recompute": "full"}], ids=str)
def test_experts_in_nvfp4(pool: RankPool, options: dict[str, Any]) -> None:
    """Coarser than FP8, the same again in a second run, and between layouts no further off than two draws are.

    Gradients are rounded at random, so that layouts, which cut tensors otherwise, draw other numbers; losses of the
    first step have no gradient in them.
    """

    def four(**options: Any) -> RunConfig:
        config = fp8_config("wan_moe", "tensorwise", **options)
        return replace(config, precision=replace(config.precision, fp8_experts="nvfp4"))

    wide, eight = (on_one_rank(pool, "wan_moe", kind, WIDTHS["tensorwise"]) for kind in ("off", "tensorwise"))
    alone, again = (pool.run(1, train, four(), 1) for _ in range(2))
    ranks = pool.run(2, train, four(**options), 2)
    exact, coarse, narrow, second, cut = (gradient_of(told) for told in (wide, eight, alone, again, ranks))
    own_error = float((narrow - exact).norm() / exact.norm())
    assert float((coarse - exact).norm() / exact.norm()) < own_error < 0.5
    assert torch.equal(narrow, second)
    assert float((cut - narrow).norm() / narrow.norm()) <= 2**0.5 * own_error
    assert ranks[0]["loss"][0] == pytest.approx(alone[0]["loss"][0], rel=5e-3)


def ops_of(config: RunConfig, world: int) -> list[str]:
    """Job: which ops round in the layers in FP8."""
    names = {REFERENCE_FP8: "reference", COMPILED_FP8: "compiled"}
    with Mesh.open(layout_of(config, world)) as mesh:
        found = [names[scaling.recipe.ops] for scaling in scalings_of(build_engine(config, mesh).chunks)]
    return sorted(set(found))


@pytest.mark.parametrize("family", ["wan", "wan_moe"])
def test_the_ops_of_the_run_round(pool: RankPool, family: str) -> None:
    for ops in ("reference", "compiled"):
        if ops == "compiled" and why_not_compiled():
            pytest.skip(f"compiled ops: {why_not_compiled()}")
        config = fp8_config(family, "mxfp8")
        config = replace(config, train=replace(config.train, ops=ops))
        assert pool.run(1, ops_of, config, 1) == [[ops]]


def magnitudes_of_step(config: RunConfig, world: int) -> dict[str, list[float]]:
    """Job: the largest magnitudes that the scales of one step are chosen from, in order, by layer and operand."""
    found = defaultdict(list)
    amaxes: list[float] = []
    original, scale_of = Fp8Scaling.scales, models_fp8.scale_of

    def seen(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        amaxes.append(float(amax))
        return scale_of(amax, dtype)

    def spied(self: Fp8Scaling, tensors: Any, *, is_training: bool) -> Any:
        amaxes.clear()
        scales = original(self, tensors, is_training=is_training)
        for role, amax in zip(scales, amaxes, strict=True):
            found[f"{self.name} {role}"].append(amax)
        return scales

    Fp8Scaling.scales = spied  # type: ignore[method-assign]
    vars(models_fp8)["scale_of"] = seen
    try:
        with Mesh.open(layout_of(config, world)) as mesh:
            engine = build_engine(config, mesh)
            initialize(engine)
            take_step(engine, 0)
    finally:
        Fp8Scaling.scales = original  # type: ignore[method-assign]
        vars(models_fp8)["scale_of"] = scale_of
    return dict(found)


@pytest.mark.parametrize(
    ("family", "world", "options"),
    [
        ("wan", 4, {"tensor": 2, "context": 2}),
        ("wan", 2, {"tensor": 2, "sequence": False}),
        ("wan_moe", 2, {"tensor": 2, "expert": 2}),
        ("wan_moe", 2, {"tensor": 2, "expert_tensor": 2}),
    ],
)
def test_a_tensor_has_one_scale_on_all_ranks_that_hold_parts_of_it(
    pool: RankPool, family: str, world: int, options: dict[str, Any]
) -> None:
    """Alike on all ranks to the bit. From layout to layout sums in another order move numbers over rounding edges, and
    the largest ones with them, by what the format rounds at most: a scale may be the next power of two."""
    alone = pool.run(1, magnitudes_of_step, fp8_config(family, "tensorwise"), 1)[0]
    assert len(alone) >= 3 * 6 * 2, sorted(alone)
    assert not any(name.startswith(("blocks.0.", "blocks.3.")) for name in alone), "outer blocks stay out"
    assert not any("router" in name or "cross_attention.k" in name for name in alone)
    ranks = pool.run(world, magnitudes_of_step, fp8_config(family, "tensorwise", **options), world)
    assert all(told == ranks[0] for told in ranks)
    assert ranks[0].keys() == alone.keys()
    for name, amaxes in ranks[0].items():
        error = 0.0 if name.endswith(" weight") else RELATIVE_ERROR[E5M2 if name.endswith(" gradient") else E4M3]
        assert amaxes == pytest.approx(alone[name], rel=error), name


def histories_of(told: list[dict[str, Any]], part: str) -> dict[str, torch.Tensor]:
    whole = assemble([rank[part] for rank in told])
    return {name: tensor for name, tensor in whole.items() if name.startswith("fp8/")}


@pytest.mark.parametrize("options", [{}, {"tensor": 2, "expert": 2}], ids=["1 rank", "tp2 ep2"])
def test_delayed_scales_survive_a_resume_bitwise(pool: RankPool, tmp_path: Path, options: dict[str, Any]) -> None:
    world = options.get("tensor", 1)
    config = fp8_config("wan_moe", "delayed", **options)
    straight = pool.run(world, train_and_save, config, world, str(tmp_path), 3, 2)
    resumed = pool.run(world, load_and_train, config, world, str(tmp_path), 3, 2)
    assert [told["loss"] for told in resumed] == [told["loss"] for told in straight]
    assert [told["norm"] for told in resumed] == [told["norm"] for told in straight]
    saved, loaded = histories_of(straight, "saved"), histories_of(resumed, "saved")
    assert {"fp8/blocks.1.self_attention.q", "fp8/blocks.2.moe.experts.up"} <= saved.keys()
    for name, history in saved.items():
        assert history.shape == (3, 4)
        assert (history[:, :3] > 0).all()
        assert (history[:, 3] == 0).all(), "three of four steps have been"
        assert torch.equal(loaded[name], history)
    if world == 1:  # law 1 of what is loaded elsewhere
        other = with_parallel(config, context=2, expert=2)
        elsewhere = pool.run(2, load_and_train, other, 2, str(tmp_path), 3, 2)
        assert elsewhere[0]["loss"] == pytest.approx(straight[0]["loss"], rel=5e-3)


def train_and_keep(config: RunConfig, folder: str) -> Any:
    """Job: one step, saved as a run saves it; tells what was."""
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        take_step(engine, 0)
        state = TrainState(step=1, updates=1).to_json(seed=0, loader={})
        checkpoint.save(Path(folder), 1, engine.fragments(), state, mesh, run_toml=dump_toml(config))
        return held(engine.fragments())


def gone_on(config: RunConfig, folder: str) -> Any:
    """Job: what a run holds that goes on from a checkpoint."""
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh)
        resume(engine, checkpoint.resolve(Path(folder)), None)
        return held(engine.fragments())


@pytest.fixture(scope="module")
def delayed_run(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with histories of four steps, and what is in it."""
    folder = tmp_path_factory.mktemp("delayed")
    return folder, assemble(pool.run(1, train_and_keep, fp8_config("wan_moe", "delayed"), str(folder)))


@pytest.mark.parametrize(
    "precision",
    [{"fp8": "off"}, {"fp8": "delayed", "fp8_history": 2}, {"fp8": "delayed", "fp8_history": 4, "dtype": "bf16"}],
    ids=["off", "shorter history", "bf16"],
)
def test_another_precision_goes_on_with_the_histories_that_fit(
    pool: RankPool, delayed_run: tuple[Path, dict[str, torch.Tensor]], precision: dict[str, Any]
) -> None:
    folder, saved = delayed_run
    config = replace(fp8_config("wan_moe", "delayed"), precision=PrecisionConfig(**precision))
    found = assemble(pool.run(1, gone_on, config, str(folder)))
    histories = [name for name in found if name.startswith("fp8/")]
    assert bool(histories) == (precision["fp8"] == "delayed")
    assert all(found[name].any() == (precision["fp8_history"] == 4) for name in histories)
    assert all(torch.equal(found[n], saved[n]) for n in found if found[n].shape == saved[n].shape)


def test_a_run_with_histories_is_converted(delayed_run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, saved = delayed_run
    out = ConvertJob.of(ConvertRequest(folder, tmp_path / "out", "diffusers"))
    assert any(f"{sum(name.startswith('fp8/') for name in saved)} tensors of fp8" in line for line in out.notices())
    out.run()
    assert open_model(tmp_path / "out").tensors.keys() == {
        name.removeprefix("buffer/").removeprefix("model/") for name in saved if name.startswith(("model/", "buffer/"))
    }
    ConvertJob.of(ConvertRequest(folder, tmp_path / "copy", "megavid", keep_optimizer=True)).run()
    copied = saved_tensors(checkpoint.Checkpoint(tmp_path / "copy"), OpenFiles())
    assert copied.keys() == saved.keys()
    assert all(torch.equal(copied[name].read(), tensor) for name, tensor in saved.items())


def test_a_delayed_scale_is_that_of_the_largest_of_the_last_steps() -> None:
    scaling = Fp8Scaling(Recipe.of("delayed", "auto"), "layer", None, 2, torch.device("cpu"))  # type: ignore[arg-type]
    x = torch.ones(4)

    def scale(factor: float) -> float:
        found = scaling.scales({"input": factor * x}, is_training=True)["input"]
        assert found is not None
        return float(found)

    def end_step() -> None:
        update_histories([scaling], lambda latest: latest)

    assert scale(448 * 0.9) == 1.0, "nothing is known yet: the tensor at hand"
    end_step()
    assert scale(448 * 7.9) == 1.0, "what was largest in the step before"
    end_step()
    assert scale(448 * 0.1) == 8.0
    assert torch.isnan(torch.tensor(scale(torch.inf)))
    end_step()
    assert scale(1.0) == 8.0, "a step with numbers that are not finite leaves nothing"
    end_step()
    assert scaling.history[0].tolist() == [1.0, 0.0]
    assert scale(1.0) == 2.0**-8


def watched_step(config: RunConfig, world: int) -> tuple[Any, Any]:
    """Job: the figures of one step, and those of a step whose layers are not watched."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        with watching(engine, True):
            take_step(engine, 0)
        figures = figures_of(engine)
        with watching(engine, False):
            take_step(engine, 1)
    return figures, worst_rounding(figures)


def test_figures_of_every_layer_reach_every_rank(pool: RankPool) -> None:
    alone, worst = pool.run(1, watched_step, fp8_config("wan_moe", "tensorwise"), 1)[0]
    assert {name.split(".")[1] for name in alone} == {"1", "2"}
    assert 0.01 < worst["error"] < 0.1
    assert 0 < worst["underflow"] < 0.2
    assert worst["overflow"] == 0, "a scale of the tensor at hand cuts nothing"
    for options in ({"tensor": 2}, {"pipeline": 2}):
        for figures, _ in pool.run(2, watched_step, fp8_config("wan_moe", "tensorwise", **options), 2):
            assert figures.keys() == alone.keys()
            for name, layer in figures.items():
                for role, rounding in layer.items():
                    assert rounding.error == pytest.approx(alone[name][role].error, rel=0.05), f"{name} {role}"


def test_figures_of_attention_stand_beside_those_of_matrices(pool: RankPool) -> None:
    recipe = "tensorwise, attention"
    alone, _ = pool.run(1, watched_step, fp8_config("wan", recipe), 1)[0]
    layers = [f"blocks.{number}.self_attention" for number in (1, 2)]
    assert [name for name in alone if name.endswith("self_attention")] == layers
    for options in ({}, {"context": 2, "context_strategy": "ring"}):
        figures, _ = pool.run(2, watched_step, fp8_config("wan", recipe, **options), 2)[0]
        for name in layers:
            assert list(figures[name]) == ["q", "k", "v"]
            for operand, rounding in figures[name].items():
                assert rounding.overflow == 0
                assert rounding.error == pytest.approx(alone[name][operand].error, rel=0.05)


@pytest.mark.parametrize("recipe", WIDTHS)
def test_a_short_run_learns_as_in_fp32(pool: RankPool, recipe: RecipeName) -> None:
    """The short version of tools/bench_fp8.py: the last losses of a run in FP8 are those of the run in fp32."""
    for kind in ("off", recipe):
        if f"short {kind}" not in REFERENCES:
            REFERENCES[f"short {kind}"] = pool.run(1, train, fp8_config("wan", kind, width=128), 1, 10)[0]
    wide, narrow = (REFERENCES[f"short {kind}"] for kind in ("off", recipe))
    last, wanted = (sum(told["loss"][-4:]) / 4 for told in (narrow, wide))
    assert wanted < 0.9 * wide["loss"][0], "the run in fp32 must learn"
    assert last == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "width", "options", "words"),
    [
        ("blockwise", 64, {}, "model.hidden_size = 64 to be a multiple of 128 on each of parallel.tensor = 1 ranks"),
        ("mxfp8", 64, {"tensor": 4}, "model.hidden_size = 64 to be a multiple of 32 on each of parallel.tensor = 4"),
        ("tensorwise", 64, {"expert_tensor": 8}, "model.moe.expert_ffn_size = 64 to be a multiple of 16"),
    ],
)
def test_widths_that_tiles_do_not_divide_are_refused(
    recipe: str, width: int, options: dict[str, Any], words: str
) -> None:
    config = fp8_config("wan_moe", recipe, width=width)
    with pytest.raises(ConfigError, match=words):
        layout_of(replace(config, parallel=ParallelConfig(**options)), 8)


def test_fp8_with_no_block_left_is_refused() -> None:
    config = fp8_config("wan", "tensorwise")
    config = replace(config, precision=PrecisionConfig(fp8="tensorwise", fp8_skip_first=3))
    with pytest.raises(ConfigError, match=r"leaves none of model.num_layers = 4 in FP8: precision.fp8_skip_first = 3"):
        layout_of(config, 1)
