"""Train or evaluate a backbone or the network of a genotype: images in, `last.pt`, `best.pt` and `metrics.csv` out.

    nas-kmix train --genotype runs/digits/genotype.json --out runs/digits-net
    nas-kmix train --preset cpu --genotype PC_DARTS_cifar --data cifar100 --out runs/net
    nas-kmix train --eval-only runs/net/best.pt --data cifar100 --export net.onnx

train_eval.py is the same command. Run the same command again to resume. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from darts_space import CifarNetwork, ImageNetNetwork, cost
from darts_space.fast.norm import join_norms
from nas_kmix.analysis.report import write_report_of_run
from nas_kmix.commands import dry_run
from nas_kmix.commands.evaluate import evaluate_checkpoint
from nas_kmix.commands.summary import of_evaluation, of_images, of_training
from nas_kmix.engine import bad_files, cli, files
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.bad_files import BadFileList
from nas_kmix.engine.cli import Flat, Invocation
from nas_kmix.engine.compute import Compute, DeviceConfig, pick_compute
from nas_kmix.engine.data import DataConfig, ImageData, load_data
from nas_kmix.engine.datasets import check_run_folder, located
from nas_kmix.engine.distributed import World, is_main, joined
from nas_kmix.engine.evaluation import EVALUATION_BATCH
from nas_kmix.engine.learner import OptimConfig, Recipe
from nas_kmix.engine.log import OnLog
from nas_kmix.engine.run import Run, open_run
from nas_kmix.engine.workers import check_room
from nas_kmix.mixers import MixConfig
from nas_kmix.paper_tables import PAPER
from nas_kmix.pipeline import network
from nas_kmix.pipeline.export import check_export, export_network
from nas_kmix.pipeline.network import NetworkConfig, NetworkTraining, preparation_of
from nas_kmix.pipeline.stage import obtain
from nas_kmix.splits import Evaluated, Part, divide, other_splits, where_validation_comes_from

STAGES = (network.NAME, network.EVALUATION)
RESULTS = (*network.FILES, "result.json", bad_files.FILE, "report.html")
SMALLEST = {
    kind.kind: kind.smallest_with_head for kind in (CifarNetwork, ImageNetNetwork)
}  # side in pixels, with an auxiliary head
COMPARED_BY = ("train/val_accuracy", "train/test_accuracy")  # of runs, by TensorBoard
OPENED = {"stages": STAGES, "results": RESULTS, "compared_by": COMPARED_BY}


@dataclass(frozen=True)
class Config(NetworkTraining):
    """All settings. `--preset` sets the defaults shown here; every other flag overrides one of them."""

    preset: str = "quick"
    """quick: digits in a minute | cpu: small and short | cifar, imagenet: PC-DARTS's settings, for GPUs |
    a row of the paper's tables, e.g. pyramidnet110-cifar100-dcutmix; an unknown name lists them all."""
    out: Path = Path("runs/train")
    """The run folder."""
    invocation: Annotated[Invocation, Flat] = field(default_factory=Invocation)
    fresh: bool = False
    """Remove what an earlier run left in --out and start over."""
    skip_bad: bool = False
    """Leave out unreadable image files and list them; otherwise the first one stops the command."""
    quiet: bool = False
    """Print nothing but warnings and the JSON of the results."""
    report: bool = True
    """Write report.html, a page about the run, at the end."""
    eval_only: Path | None = None
    """Evaluate this last.pt, best.pt or scorer.pt on the val and test splits of --data, without training."""
    export: Path | None = None
    """Also write the network after the last epoch, or that of --eval-only, to this file, .pt2 (torch.export) or .onnx:
    a program from uint8 images to logits."""
    export_raw: bool = False
    """Let the exported program take normalised float32 images."""
    input: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    device: Annotated[DeviceConfig, Flat] = field(default_factory=DeviceConfig)


PRESETS: dict[str, Config] = {
    # The embedded digits, which must not be mirrored.
    "quick": Config(
        network=NetworkConfig(channels=4, layers=5),
        input=DataConfig(data="digits"),
        augmentation=Augmentation(flip=False, crop_padding=2),
        optim=OptimConfig(epochs=5, batch_size=32, lr=0.1, schedule="cosine", weight_decay=3e-4),
        recipe=Recipe(grad_clip=5.0),
        device=DeviceConfig(channels_last=True),
    ),
    # For comparing genotypes on a laptop: too short for drop-path and cutout to help.
    "cpu": Config(
        preset="cpu",
        network=NetworkConfig(channels=8, layers=8),
        input=DataConfig(data="cifar100"),
        optim=OptimConfig(epochs=15, batch_size=64, lr=0.1, schedule="cosine", weight_decay=3e-4),
        recipe=Recipe(grad_clip=5.0),
        device=DeviceConfig(channels_last=True),
    ),
    # PC-DARTS section 4.2. Expect 2.57 +- 0.07 % test error on CIFAR-10 with PC_DARTS_cifar (its Table 1), which trains
    # on all images: --val-share 0.
    "cifar": Config(
        preset="cifar",
        input=DataConfig(data="cifar10"),
        augmentation=Augmentation(cutout=16),
        optim=OptimConfig(epochs=600, batch_size=96, lr=0.025, schedule="cosine", weight_decay=3e-4),
        recipe=Recipe(nesterov=False, grad_clip=5.0, drop_path=0.3),
    ),
    # PC-DARTS section 4.3. Expect 24.2 % top-1 error with PC_DARTS_image, 25.1 % with PC_DARTS_cifar (its Table 2).
    "imagenet": Config(
        preset="imagenet",
        network=NetworkConfig(channels=48, layers=14),
        input=DataConfig(data="imagenet", image_size=224, max_resident_gb=0.0),  # crops of whole photographs
        augmentation=Augmentation(color_jitter=(0.4, 0.4, 0.4, 0.2)),
        optim=OptimConfig(epochs=250, batch_size=1024, lr=0.5, schedule="linear", weight_decay=3e-5),
        recipe=Recipe(nesterov=False, warmup_epochs=5, grad_clip=5.0, label_smoothing=0.1),
    ),
}
PRESETS |= {  # the rows of the paper's tables, which train on all training images and select no epoch
    name: Config(
        preset=name,
        val_share=0.0,
        network=NetworkConfig(**paper.network),
        input=DataConfig(**paper.input),
        augmentation=Augmentation(**paper.augmentation),
        optim=OptimConfig(**paper.optim),
        mix=MixConfig(**paper.mix),
        recipe=Recipe(**paper.recipe),
    )
    for name, paper in PAPER.items()
}


def run(config: Config, *, on_log: OnLog | None = None) -> dict[str, Any]:
    """Train or evaluate, and return what the last line of the output says.

    `on_log(stage, step, values)` hears of every row of the log of a training.
    Raises ValueError (bad input, with the remedy), StageMismatchError, StoppedError, NonFiniteLossError, OSError.
    """
    _check_flags(config)
    config = replace(config, input=replace(config.input, data=located(config.input.data)))
    if config.eval_only is not None:
        return evaluate_checkpoint(config)
    watched = {"on_log": on_log, "quiet": config.quiet}
    check_run_folder(config.out, config.input.data)
    with open_run(config.out, asdict(config), config.device, **OPENED, **watched) as run:
        config.mix.check_processes(run.world.size)
        data, splits, training, evaluated = _load_images(config, run.compute)
        model = network.build(config.network, data, seed=config.seed)
        description = network.describe(model, config.network, data)
        result = {"kind": "train", "network": description, "seed": config.seed, **cost(model, data.image_size)}
        _check_machine(config, data, model, training, run)
        if config.fresh:
            run.clear()
        if config.preset in PAPER:
            run.say(f"the paper's {PAPER[config.preset].doc}")
        run.say(of_images(data, len(training.indices), config.augmentation))
        run.say(f"network: {result['params_without_aux']:,} parameters, {result['macs']:,} multiply-adds")
        run.say(where_validation_comes_from(config.input.data, splits, evaluated, config.val_share))
        settings = _in_world(config, run.world)
        if settings.sync_batchnorm and run.compute.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # the same, in fewer kernels
        elif settings.sync_batchnorm:
            join_norms(model)
        bad = BadFileList((training.data, *(part.data for part in evaluated.values())), run.world)
        trained = obtain(network, settings, model, training, evaluated, bad, run=run)
        run.finish()
        result |= {"epochs": config.optim.epochs, "train_images": len(training.indices)}
        result |= {"last": trained.last, "best": trained.best, **_speed(run), "folder": str(config.out)}
        result |= {"bad_images": (count := bad.write(run.folder))}
        if count:
            run.say(f"warning: {count} files cannot be read and were left out; {bad_files.FILE} lists them")
        if run.world.main:
            files.write_json(run.path("result.json"), result)
            if config.export is not None:
                made = trained.model, preparation_of(data), training.examples()
                export_network(*made, config.export, raw=config.export_raw)
            if config.report:
                run.say(write_report_of_run(run.folder, data))
        return result


def foreseen(config: Config) -> Iterator[str]:
    """What `run` would do, line by line; refusals are the same."""
    _check_flags(config)
    if config.eval_only is not None:
        raise ValueError("--eval-only trains nothing and takes no time to speak of; leave out --dry-run.")
    config = replace(config, input=replace(config.input, data=located(config.input.data)))
    check_run_folder(config.out, config.input.data)
    Run(config.out, **OPENED).check_folder()
    compute = pick_compute(config.device)
    data, splits, training, evaluated = _load_images(config, compute)
    model = network.build(config.network, data, seed=config.seed)
    name = config.network.backbone or f"{config.network.layers} cells of {model.channels} channels"
    with joined(compute.device) as world:
        config.mix.check_processes(world.size)
        chain = dry_run.Chain(data, compute, config.out, config.fresh, world)
        _check_machine(config, data, model, training, chain.run)
        bad = BadFileList((training.data, *(part.data for part in evaluated.values())), world)
        found = chain.find(network, _in_world(config, world), model, training, evaluated, bad)
    yield from dry_run.of_training(name, model, config, len(training.indices), chain, found is not None)
    yield where_validation_comes_from(config.input.data, splits, evaluated, config.val_share)


def _load_images(config: Config, compute: Compute) -> tuple[ImageData, Evaluated, Part, Evaluated]:
    """The training split; the val and test splits that --data has; what is trained on, and what is evaluated."""
    options = {"device": compute.device, "workers": config.device.workers, "strict": not config.skip_bad}
    data = load_data(config.input, **options)
    _check_size(config, data)
    splits = other_splits(config.input, data, **options)
    shares = {"val_share": config.val_share, "train_images": config.train_images}
    return data, splits, *divide(data, splits, **shares, seed=config.seed)


def _in_world(config: Config, world: World) -> Config:
    """The settings that take effect: a single process has no batches to synchronise."""
    return replace(config, sync_batchnorm=config.sync_batchnorm and world.size > 1)


def _speed(run: Run) -> dict[str, float]:
    """Seconds of training, without evaluation, over all invocations, and training images per second."""
    spent = run.ledger.costs[network.NAME]
    per_second = spent.images_backward / max(spent.wall_s, 1e-9)
    return {"train_s": round(spent.wall_s, 1), "images_per_second": round(per_second, 1)}


# -- refusals ----------------------------------------------------------------------------------------------------------


def _check_flags(config: Config) -> None:
    """Refuse flags that contradict each other."""
    if config.preset not in PRESETS:
        raise ValueError(f"there is no --preset {config.preset}; choose one of {', '.join(PRESETS)}.")
    settings = config.network
    if config.eval_only is None and (settings.genotype is None) == (settings.backbone is None):
        raise ValueError("Give one of --genotype FILE|NAME|TEXT and --backbone NAME, the network to train.")
    if config.eval_only is not None and (settings.genotype, settings.backbone, settings.max_macs) != (None, None, None):
        raise ValueError("--eval-only reads the network from its file; leave out --genotype, --backbone, --max-macs.")
    if config.eval_only is not None and config.eval_only.is_dir():
        raise ValueError(f"--eval-only {config.eval_only} is a folder; name a file in it, e.g. last.pt or best.pt.")
    if config.export is not None:
        check_export(config.export)
    elif config.export_raw:
        raise ValueError("--export-raw says what the program of --export FILE takes; give that too.")
    if settings.max_macs is not None and settings.genotype is None:
        raise ValueError("--max-macs chooses the channels of a genotype's network; a backbone has fixed ones.")
    if settings.backbone is None and (settings.stochastic_depth or settings.drop_block):
        raise ValueError(
            "--stochastic-depth and --drop-block are for a --backbone; a genotype's network has --drop-path."
        )
    if config.mix.mix == "manifold_mixup" and (settings.backbone is None or config.recipe.accumulate > 1):
        raise ValueError(
            "--mix manifold_mixup mixes a whole batch inside a --backbone: give one, and leave --accumulate at 1."
        )
    if not 0.0 <= config.val_share < 1.0:
        raise ValueError(f"--val-share must be at least 0 and below 1, not {config.val_share}.")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2**63, not {config.seed}.")
    if config.eval_every < 1 or (config.train_images is not None and config.train_images < 1):
        raise ValueError("--eval-every and --train-images must be at least 1.")


def _check_machine(config: Config, data: ImageData, model: nn.Module, training: Part, run: Run) -> None:
    """Refuse a batch that does not fit into memory, or into the shared memory of the workers that read it."""
    if not data.resident:
        run.world.barrier()  # no process reads now, so that the free memory is all there is
        largest = min(max(config.optim.batch_size // run.world.size, EVALUATION_BATCH), len(data))
        check_room(largest, data.image_size, data.workers)
    if config.fresh or not run.path(network.FILE).exists():
        network.check_memory(config, model, training, run)


def _check_size(config: Config, data: ImageData) -> None:
    with_head = config.network.genotype is not None and config.network.auxiliary
    smallest = SMALLEST[data.stem] if with_head else 0
    if data.image_size < smallest:
        raise ValueError(
            f"The images have {data.image_size} px, but the auxiliary head of a genotype's network takes {smallest} px "
            f"or more; use --image-size {smallest}, or --no-auxiliary."
        )


def parse(argv: Sequence[str], description: str | None = __doc__) -> Config:
    config = cli.parse(PRESETS, argv, description)
    given = config.invocation.config is not None or cli.value_of("--image-size", argv) is not None
    if config.eval_only is not None and not given:
        config = replace(config, input=replace(config.input, image_size=None))  # that of the network, not the preset's
    return config


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Run and turn every expected failure into one sentence. Exit codes: 0, 1, 2 (bad usage), 130 and 143 (signals)."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        config = parse(argv, description)
        if config.invocation.dry_run:
            said = "\n".join(foreseen(config))
            if is_main():
                print(said)
            return
        result = run(config)
        if is_main():
            if not config.quiet:
                print((of_training if config.eval_only is None else of_evaluation)(result))
            print(json.dumps(result))

    return cli.exit_code(work, lambda error: "Start over with --fresh, or choose another --out.")
