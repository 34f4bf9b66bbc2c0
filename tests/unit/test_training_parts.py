"""Parts of the loop on their own: arguments, callbacks, the stop signal, recorded losses, routing rows, the kit."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.checkpoint import AsyncSaver, Checkpoint, SingleRank, save
from megavid.cli.arguments import decimal_number, take_all, take_flag, take_option, whole_number
from megavid.cli.train import parse
from megavid.config.load import dump_toml, load_run
from megavid.config.schema import CheckpointConfig, DiffusionConfig
from megavid.data.build import build_source, build_text_encoder
from megavid.diffusion.objective import FlowObjective
from megavid.errors import CheckpointError, ConfigError, DataError
from megavid.models.moe.stats import RoutingStats
from megavid.ops.packs import Clip, LatentBatch, Pack
from megavid.plan.layout import layout_of
from megavid.training.build import build_callbacks, check_reports
from megavid.training.callbacks import Callback, Callbacks, RouterLog, WorstSamples
from megavid.training.kit import KIT, VOCABULARY, SamplingKit
from megavid.training.resume import check_init_from
from megavid.training.routing import join_stages, layer_rows, worst_figures
from megavid.training.sample_run import files_of, sampling_config
from megavid.training.step import ClipLoss, RecordingObjective
from megavid.training.stop import StopSignal


class OneRank:
    """A mesh of one, as far as these parts look."""

    device = torch.device("cpu")
    is_main = True

    def max(self, tensor: Tensor, over: str) -> Tensor:
        return tensor.clone()

    def sum(self, tensor: Tensor, over: str) -> Tensor:
        return tensor.clone()

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, value]  # as two ranks of one replica would


def test_options_are_taken_and_config_keys_are_left() -> None:
    argv = ["tiny", "--out", "a", "--train.steps", "3", "--ranks=2", "--gif", "--prompt", "x", "--prompt", "y"]
    assert (take_option(argv, "--out"), take_option(argv, "--ranks"), take_option(argv, "--seed")) == ("a", "2", "")
    assert take_flag(argv, "--gif")
    assert take_all(argv, "--prompt") == ["x", "y"]
    assert argv == ["tiny", "--train.steps", "3"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tiny"], "--out DIR is missing"),
        (["tiny", "--out"], "--out needs a value"),
        (["--out", "a"], "first argument must be a preset"),
        (["tiny", "--out", "a", "--out", "b"], "given 2 times"),
        (["tiny", "--out", "a", "--ranks", "0"], "at least 1"),
        (["tiny", "--out", "a", "--ranks", "two"], "whole number"),
    ],
)
def test_train_arguments_are_checked(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(argv)


def test_numbers_of_the_command_line_are_checked() -> None:
    assert whole_number("", "--seed", default=7, minimum=0) == 7
    assert decimal_number("1e-1", "--guidance", default=4.0, minimum=0.0) == 0.1
    for text in ("x", "nan", "-1"):
        with pytest.raises(ConfigError, match="--guidance"):
            decimal_number(text, "--guidance", default=4.0, minimum=0.0)


class Spy(Callback):
    """Notes when it is asked."""

    def __init__(self, name: str, log: list[str], *, fails: bool = False) -> None:
        self.name, self.log, self.fails = name, log, fails

    def before_training(self, run: Any) -> None:
        self.log.append(f"{self.name} begins")
        if self.fails:
            raise OSError("no room")

    def after_step(self, run: Any, report: Any) -> None:
        self.log.append(f"{self.name} {report.step}")

    def after_training(self, run: Any) -> None:
        self.log.append(f"{self.name} ends")


def callbacks_of(*entries: tuple[Callback, int]) -> Callbacks:
    run: Any = None
    return Callbacks(run, entries)


def test_callbacks_are_asked_at_their_intervals_in_order() -> None:
    log: list[str] = []
    with callbacks_of((Spy("a", log), 1), (Spy("b", log), 2)) as callbacks:
        for step in (1, 2):
            report: Any = SimpleNamespace(step=step)
            callbacks.after_step(report)
    assert log == ["a begins", "b begins", "a 1", "a 2", "b 2", "b ends", "a ends"]


def test_callback_that_cannot_begin_ends_those_that_have() -> None:
    log: list[str] = []
    with pytest.raises(OSError, match="no room"), callbacks_of((Spy("a", log), 1), (Spy("b", log, fails=True), 1)):
        pass
    assert log == ["a begins", "b begins", "a ends"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_is_agreed_on_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal(OneRank()) as stop:
        assert stop.agree() == ""
        os.kill(os.getpid(), number)
        assert stop.agreed == ""
        assert stop.agree() == number.name
    assert signal.getsignal(number) == before


def batch_of_two_clips() -> LatentBatch:
    clips = (Clip(10, 3, 0, (1, 2, 2), 4.0), Clip(11, 5, 4, (1, 2, 2), 4.0))
    return LatentBatch((Pack(clips, 12),), torch.ones(1, 12, 8), torch.zeros(2, 4, 16))


def test_recording_changes_no_loss_and_keeps_each_clips_own() -> None:
    plain = FlowObjective(DiffusionConfig(), seed=1)
    recording = RecordingObjective(plain)
    batch = batch_of_two_clips()
    noised = recording.noise(batch)
    velocity = torch.zeros_like(noised.target_BTP)
    losses = recording.loss(velocity, noised)
    assert torch.equal(losses.sum_G, plain.loss(velocity, plain.noise(batch)).sum_G)
    mesh: Any = OneRank()
    found = recording.take(mesh)
    assert [(clip.sample, clip.draw) for clip in found] == [(3, 10), (5, 11)]
    assert [clip.loss for clip in found] == pytest.approx((losses.sum_G / losses.elements_G).tolist())
    assert recording.take(mesh) == ()


def test_worst_samples_name_each_clip_once() -> None:
    events: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(
        mesh=OneRank(), state=SimpleNamespace(step=9), event=lambda name, **fields: events.append(fields)
    )
    worst = WorstSamples(2)
    losses = (
        ClipLoss(1, 1, 0.1, 5.0),
        ClipLoss(2, 2, 0.2, math.nan),
        ClipLoss(3, 3, 0.3, 7.0),
        ClipLoss(4, 4, 0.4, 1.0),
    )
    report: Any = SimpleNamespace(clip_losses=losses)
    worst.after_step(run, report)
    worst.before_save(run)
    assert [(row["sample"], row["loss"]) for row in events[0]["clips"]] == [(3, 7.0), (1, 5.0)]


def test_routing_of_all_stages_stands_in_one_table() -> None:
    model = load_run("tiny", []).model
    counts_QE = torch.zeros(4, 8)
    counts_QE[2, :4] = 5
    q = torch.tensor([0.0, 0.0, 10.0, 0.0])
    stats = RoutingStats(counts_QE, counts_QE, 2 * q, q, torch.zeros(4), torch.tensor(0.5), torch.tensor(0.0))
    mesh: Any = OneRank()
    joined = join_stages(model, mesh, {2: stats})
    assert sorted(joined) == [1, 2]
    rows = layer_rows(joined)
    assert rows["2"]["tokens"] == [0, 0, 10, 0]
    assert rows["2"]["counts"] == counts_QE.int().tolist()
    assert rows["2"]["entropy"] == [0.0, 0.0, 2.0, 0.0]
    assert worst_figures({2: joined[2]})["max_load"] == 2.0
    assert worst_figures({}) == {}


@pytest.mark.parametrize(
    "flags",
    [("--log.validation_interval_steps", "2"), ("--log.sample_interval_steps", "2")],
)
def test_reports_that_could_never_come_are_refused(flags: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_samples = 0"):
        check_reports(load_run("tiny", ["--data.validation_samples", "0", *flags]))
    check_reports(load_run("tiny", [*flags]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint with no tensors, saved in a layout of eight ranks, with its kit."""
    config = load_run(
        "tiny", ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2"]
    )
    kit = SamplingKit.of(config, build_source(config), build_text_encoder(config))
    folder = tmp_path_factory.mktemp("checkpoints")
    with AsyncSaver(folder, SingleRank(), CheckpointConfig(), run_toml=dump_toml(config), extra=kit.files()) as saver:
        saver.save(1, [], {})
    return Checkpoint(folder / "step_00000001")


def test_kit_comes_back_from_a_checkpoint_alone(checkpoint: Checkpoint) -> None:
    config = load_run("tiny", [])
    kit, encoder = SamplingKit.load(checkpoint), build_text_encoder(config)
    captions = ["a red circle", ""]
    assert torch.equal(kit.text_encoder.encode(captions), encoder.encode(captions))
    assert kit.tokenizer == build_source(config).tokenizer
    assert (kit.size.frames, kit.size.frame_rate) == (17, 16.0)
    assert kit.video_tokenizer().spec == kit.tokenizer


def test_weights_trained_on_another_tokenizer_are_refused(checkpoint: Checkpoint) -> None:
    channels = ("--model.in_channels", "32", "--model.out_channels", "32")
    config = load_run("tiny", ["--train.init_from", str(checkpoint.folder), *channels])
    source = build_source(config)
    assert check_init_from(config, source).step == 1
    other = dataclasses.replace(source.tokenizer, version="2")
    stand_in: Any = SimpleNamespace(tokenizer=other, name="shards/")
    with pytest.raises(DataError, match=r"shards/: latents were made with tokenizer version = '2'"):
        check_init_from(config, stand_in)


@pytest.mark.parametrize("name", [KIT, VOCABULARY])
def test_damaged_kit_is_named(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / checkpoint.folder.name))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        SamplingKit.load(Checkpoint(folder))


def test_checkpoint_without_a_kit_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, [], {}, SingleRank(), run_toml=dump_toml(load_run("tiny", [])))
    with pytest.raises(CheckpointError, match=r"sampling\.json"):
        SamplingKit.load(Checkpoint(folder))


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [((), 1), ((), 3), (("--parallel.tensor", "2", "--parallel.expert", "2"), 4), (("--parallel.pipeline", "2"), 2)],
)
def test_sampling_layout_is_the_callers_alone(checkpoint: Checkpoint, overrides: tuple[str, ...], ranks: int) -> None:
    config = sampling_config(checkpoint, overrides, ranks)
    layout = layout_of(config, ranks)
    assert layout.vpp == 1
    assert layout.tp == (2 if "--parallel.tensor" in overrides else 1)
    assert config.model == load_run("tiny", []).model


def test_what_deepspeed_trained_is_sampled_in_any_layout(tmp_path: Path) -> None:
    config = load_run("tiny", ["--train.backend", "deepspeed", "--deepspeed.zero_stage", "3"])
    trained = Checkpoint(save(tmp_path, 1, [], {}, SingleRank(), run_toml=dump_toml(config)))
    assert layout_of(sampling_config(trained, ("--parallel.tensor", "2"), 2), 2).tp == 2


def test_several_prompts_get_numbered_files() -> None:
    assert files_of(Path("a/clip.mp4"), 1) == [Path("a/clip.mp4")]
    assert files_of(Path("a/clip.mp4"), 2) == [Path("a/clip_1.mp4"), Path("a/clip_2.mp4")]


def test_alarms_of_routers_come_at_every_step_and_rows_at_the_interval(tmp_path: Path) -> None:
    collapsed = RoutingStats(*(torch.zeros(shape) for shape in ((1, 8), (1, 8), 1, 1, 1, (), ())))
    collapsed.counts_QE[0, 3] = collapsed.tokens_Q[0] = 100.0
    alarmed: list[int] = []
    run: Any = SimpleNamespace(
        config=load_run("tiny", ["--log.interval_steps", "2"]),
        mesh=SimpleNamespace(is_main=True, world_size=1),
        run_dir=SimpleNamespace(router_file=tmp_path / "router.jsonl"),
        event=lambda name, step, alarms: alarmed.append(step),
    )
    entries = [entry for entry in build_callbacks(run).entries if isinstance(entry[0], RouterLog)]
    with Callbacks(run, entries) as callbacks:
        for step in range(1, 5):
            report: Any = SimpleNamespace(step=step, routing={1: collapsed})
            callbacks.after_step(report)
    assert alarmed == [1, 2, 3, 4]
    rows = (tmp_path / "router.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4]
