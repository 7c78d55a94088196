"""The part of train_eval.py that trains nothing: evaluate the checkpoint of --eval-only, and export its network."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nas_kmix.analysis.classifiers import load_classifier
from nas_kmix.analysis.runs import recorded_input, same_place, warn_of_training_images
from nas_kmix.engine.bad_files import BadFileList
from nas_kmix.engine.compute import pick_compute
from nas_kmix.engine.datasets import is_divided
from nas_kmix.engine.distributed import joined
from nas_kmix.engine.progress import Progress
from nas_kmix.pipeline import network
from nas_kmix.pipeline.export import export_network
from nas_kmix.pipeline.network import preparation_of
from nas_kmix.splits import Part, evaluate_all, of_known_classes, other_splits

if TYPE_CHECKING:
    from nas_kmix.commands.train import Config


def evaluate_checkpoint(config: Config) -> dict[str, Any]:
    """Evaluate the file of --eval-only; write nothing but the file of --export.

    Images have the size that the network was trained on, unless `config.input` has one.
    """
    compute = pick_compute(config.device)
    with joined(compute.device) as world:
        trained = load_classifier(config.eval_only)
        _check_split_seed(config)
        warn_of_training_images(config.input, trained)
        if config.input.image_size is not None:
            trained = replace(trained, image_size=config.input.image_size)
        options = {"device": compute.device, "workers": config.device.workers, "strict": not config.skip_bad}
        sets = other_splits(config.input, trained, **options, same_classes=False)
        if not sets:
            raise ValueError(f"--data {config.input.data} has neither val nor test images to evaluate on.")
        names = trained.class_names
        evaluated, unknown = {}, []
        for split, part in sets.items():
            try:
                evaluated[split] = of_known_classes(part, names, str(trained.path))
            except ValueError as error:  # as in Tiny-ImageNet, whose test images have no classes
                unknown.append(error)
        if not evaluated:
            raise unknown[0]
        for error in unknown if world.main else ():
            Progress.say(f"warning: {error}")
        for split, part in evaluated.items():
            if world.main and not config.quiet:
                Progress.say(f"{split}: {_coverage(sets[split], part, names)}")
        model = compute.layout(trained.model.to(compute.device))
        own = sum(len(part.indices[world.share(len(part.indices))]) for part in evaluated.values())
        progress = Progress(network.EVALUATION, own, unit="image", silent=config.quiet or not world.main)
        metrics = evaluate_all(model, evaluated, compute, world, progress)
        progress.close()
        bad = BadFileList((part.data for part in evaluated.values()), world).gather()
        if bad and world.main:
            first = next(iter(bad.values()))
            Progress.say(f"warning: {len(bad)} files cannot be read and were left out; the first is {first}")
        if config.export is not None and world.main:
            examples = next(iter(evaluated.values())).examples()
            export_network(model, preparation_of(trained), examples, config.export, raw=config.export_raw)
        images = {split: part.readable(bad) for split, part in evaluated.items()}
        return {"checkpoint": str(config.eval_only), "images": images, **metrics, "bad_images": len(bad)}


def _coverage(whole: Part, known: Part, names: tuple[str, ...]) -> str:
    """How many images of a split a network with these classes can be tested on, and which classes it does not know."""
    here = whole.data.class_names
    unknown = [name for name in here if name not in names]
    text = (
        f"{len(known.indices)} images of {known.data.image_size} px; the network, trained on {len(names)} classes, "
        f"knows {len(here) - len(unknown)} of its {len(here)} classes"
    )
    if not unknown:
        return text
    some = ", ".join([*unknown[:3], "…"] if len(unknown) > 3 else unknown)
    return f"{text}; left out: {len(whole.indices) - len(known.indices)} of unknown classes ({some})"


def _check_split_seed(config: Config) -> None:
    """Refuse to test on images of a set without splits that the network was trained on."""
    data, split_seed = recorded_input(config.eval_only)
    if data is None or not is_divided(config.input.data) or not same_place(data, config.input.data):
        return
    if split_seed != config.input.split_seed:
        raise ValueError(
            f"{config.eval_only} was trained with --split-seed {split_seed}, so that with {config.input.split_seed} "
            f"some of the test images would be its training images; add --split-seed {split_seed}."
        )
