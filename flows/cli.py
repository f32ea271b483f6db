"""The `kpmask` command. Only what `--help` needs is imported at the top: it answers at once.

Single-pair `animate`, `report`, `checkpoint` and `doctor` need neither Prefect nor Ray; the jobs
run as Prefect flows, in this process and without a server unless PREFECT_API_URL names one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import kpmask
from flows import console
from flows.changes import change_line
from flows.dataset_cli import app as dataset_app
from flows.importing import own_process
from flows.options import AsJson, DryRun, JobFile, Out, Overrides, Preset, say_plan
from flows.study_cli import app as study_app
from flows.weights_cli import app as weights_app
from kpmask import config
from kpmask.errors import ConfigError
from kpmask.metric_names import SPELLED

app = typer.Typer(
    cls=console.GuardedGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Animate still images with the motion of a driving video: cut datasets, train, animate "
        "catalogs, evaluate.\n\nStart with: kpmask demo"
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kpmask {kpmask.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of the command itself."""


checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at weights, or import original ones.")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(dataset_app, name="dataset")
app.add_typer(weights_app, name="weights")
app.add_typer(study_app, name="study")


def _workers(count: int | None) -> dict[str, Any] | None:
    return None if count is None else {"num_workers": count}


def _given(**values: Any) -> dict[str, Any] | None:  # noqa: ANN401 - flags of any type
    """The flags of a job's part that were given."""
    return {name: value for name, value in values.items() if value is not None} or None


@app.command()
def preprocess(
    out: Out,
    metadata: Annotated[
        str | None,
        typer.Option(
            help="CSV: video_id,start,end,bbox,fps,width,height,partition[,person_id]; it may be "
            "packed by gzip. For voxceleb1 and voxceleb2 the folder of person/video/utterance.txt, "
            "or a zip or tar of it."
        ),
    ] = None,
    videos: Annotated[
        str | None, typer.Option(help="Folder or glob of your own videos, instead of metadata.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="What these are: table, taichi, voxceleb1, voxceleb2 (metadata); nemo, robonet "
            "(HDF5 files), videos. Default: table, or videos."
        ),
    ] = None,
    raw: Annotated[
        str | None, typer.Option(help="Folder or s3:// of raw videos; what lacks is downloaded.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="shards, or folders (the original research code's layout).")
    ] = None,
    preset: Preset = None,
    job: JobFile = None,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers; default one a CPU.")] = None,
    retry_now: Annotated[
        bool, typer.Option("--retry-now", help="Also try what waits for a later run, or gave up.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Cut raw videos into a dataset of clips.

    Examples:

        kpmask preprocess --metadata taichi.csv --raw videos --out data/taichi --preset taichi256

        kpmask preprocess --videos 'my-videos/*.mp4' --out s3://bucket/mine --set clips.size_px=64

        kpmask preprocess --videos talks --out data/talks --set subject.detector=auto

        kpmask preprocess --preset voxceleb1 --metadata vox1_dev_txt.zip --out data/vox1

        kpmask preprocess --preset robonet256 --source robonet --videos hdf5 --out data/robonet
    """
    resolved = config.resolve_job(
        config.PreprocessJob,
        preset=preset,
        job_file=job,
        overrides=overrides or (),
        flags={
            "out": out,
            "metadata": metadata,
            "videos": videos,
            "source": source,
            "raw": raw,
            "storage": None if layout is None else {"layout": layout},
            "cluster": _workers(workers),
            "retry": {"backoff_s": 0, "max_attempts": 0} if retry_now else None,
        },
    )
    from flows import jobs

    if dry_run:
        say_plan(resolved, jobs.plan_preprocess(resolved), as_json=as_json)
        return
    manifest, changes = jobs.run_preprocess(resolved, quiet=as_json)
    lines = [
        f"{manifest.num_train} train and {manifest.num_test} test clips, "
        f"{manifest.num_frames} frames; {manifest.num_failures} failures",
        change_line(changes),
        f"dataset: {manifest.uri}",
    ]
    result = jobs.as_result(manifest) | {"changes": jobs.as_result(changes)}
    console.show(result, as_json=as_json, lines=lines)


@app.command()
def train(
    data: Annotated[str, typer.Option(help="A dataset that `kpmask preprocess` made.")],
    out: Out,
    preset: Preset = None,
    job: JobFile = None,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Training processes.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="End every phase after so many.")] = None,
    system: Annotated[
        str | None, typer.Option(help="Which of the preset's systems; default: its first.")
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Go on where the run stopped.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a keypoint detector, then the mask-and-generate model on it.

    Examples:

        kpmask train --preset taichi256 --data data/taichi --out runs/taichi --workers 4

        kpmask train --preset debug --data data/mine --out runs/try --set seed=1

        kpmask train --preset taichi256 --system refined --data data/taichi --out runs/refined
    """
    if system is not None and preset is None:
        raise ConfigError("it names a system of a preset: give --preset", subject="--system")
    resolved = config.resolve_job(
        config.TrainJob,
        preset=preset,
        job_file=job,
        overrides=overrides or (),
        flags={"data": data, "out": out, "num_workers": workers, "resume": resume},
        systems=None if system is None else [system],
    )
    if max_steps is not None:
        phases = [phase.model_copy(update={"max_steps": max_steps}) for phase in resolved.phases]
        resolved = resolved.model_copy(update={"phases": tuple(phases)})
        resolved = config.validated(config.TrainJob, resolved.model_dump(mode="json"))
    from flows import jobs

    if dry_run:
        say_plan(resolved, jobs.plan_train(resolved), as_json=as_json)
        return
    manifest = jobs.run_train(resolved, quiet=as_json)
    lines = [
        f"{manifest.system}: {manifest.num_steps} steps, final loss {manifest.final_loss:.4f} "
        f"(perceptual features: {manifest.perceptual})",
        f"run: {manifest.uri}",
    ]
    console.show(jobs.as_result(manifest), as_json=as_json, lines=lines)


@app.command()
def animate(
    checkpoint: Annotated[
        str, typer.Option(help="A weights file of `train` or `import`, or a bundled name: demo.")
    ],
    out: Annotated[
        str,
        typer.Option(
            help="For one pair a file .mp4, .webm, .gif or .zip (of PNGs), else a folder or s3://."
        ),
    ],
    source: Annotated[str | None, typer.Option(help="One image.")] = None,
    driving: Annotated[str | None, typer.Option(help="One video.")] = None,
    catalog: Annotated[
        str | None, typer.Option(help="CSV or Parquet: source,driving[,name,motion,crop,...].")
    ] = None,
    sources: Annotated[
        str | None, typer.Option(help="Glob of images, each with each video.")
    ] = None,
    drivings: Annotated[str | None, typer.Option(help="Glob of videos.")] = None,
    motion: Annotated[str | None, typer.Option(help="absolute or relative.")] = None,
    adapt_scale: Annotated[
        bool | None, typer.Option(help="Scale relative motion to the source's size.")
    ] = None,
    best_frame: Annotated[
        bool | None, typer.Option(help="Relative motion from the frame most like the source.")
    ] = None,
    audio: Annotated[bool | None, typer.Option(help="Copy the driving video's audio.")] = None,
    crop: Annotated[
        str | None,
        typer.Option(help="Of the image: centre, auto, face, person or left-top-right-bottom."),
    ] = None,
    driving_crop: Annotated[
        str | None, typer.Option(help="Of the video: as --crop, or motion.")
    ] = None,
    paste_back: Annotated[
        bool | None, typer.Option(help="Put the result back into the whole image.")
    ] = None,
    side_by_side: Annotated[
        bool | None, typer.Option(help="Show source, driving video and result in a row.")
    ] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help="mp4, webm, gif or png (a .zip of pictures).")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames/s of the result; its duration stays.")
    ] = None,
    no_credentials: Annotated[
        bool, typer.Option("--no-credentials", help="Do not sign the results as generated (C2PA).")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16, or plain: the network as it was trained."),
    ] = None,
    preset: Preset = None,
    job: JobFile = None,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers; default one a CPU.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Animate one image by one video, or a catalog of them.

    Examples:

        kpmask animate --checkpoint demo --source me.jpg --driving dance.mp4 --out out.mp4

        kpmask animate --checkpoint w.safetensors --catalog pairs.csv --out s3://bucket/shop

        kpmask animate --checkpoint w.safetensors --sources 'i/*.png' --drivings 'v/*.mp4' --out g

        kpmask animate --checkpoint demo --source group.jpg --crop face --paste-back
        --driving talk.mp4 --audio --out group.webm

        kpmask animate --checkpoint demo --source me.jpg --driving dance.mp4 --side-by-side
        --fps 15 --out compare.gif
    """
    resolved = config.resolve_job(
        config.AnimateJob,
        preset=preset,
        job_file=job,
        overrides=overrides or (),
        flags={
            "checkpoint": checkpoint,
            "out": out,
            "source": source,
            "driving": driving,
            "catalog": catalog,
            "sources": sources,
            "drivings": drivings,
            "motion": motion,
            "adapt_scale": adapt_scale,
            "best_frame": best_frame,
            "audio": audio,
            "output": _given(
                crop=crop,
                driving_crop=driving_crop,
                paste_back=paste_back,
                side_by_side=side_by_side,
                format=file_format,
                fps=fps,
            ),
            "credentials": {"enabled": False} if no_credentials else None,
            "device": device,
            "precision": precision,
            "cluster": _workers(workers),
        },
    )
    from flows import jobs

    if dry_run:
        say_plan(resolved, jobs.plan_animate(resolved), as_json=as_json)
        return
    if resolved.source is not None:
        video = jobs.run_animate_pair(resolved, quiet=as_json)
        lines = [
            f"{resolved.out}: {video.num_frames} frames at {video.fps:g} frames/s",
            f"content credentials: {video.credentials}",
        ]
        console.show(jobs.as_result(video), as_json=as_json, lines=lines)
        return
    manifest = jobs.run_animate(resolved, quiet=as_json)
    lines = [
        f"{manifest.num_items} animations, {manifest.num_frames} frames; "
        f"{manifest.num_failures} failures",
        f"gallery: {manifest.uri}/index.html",
    ]
    console.show(jobs.as_result(manifest), as_json=as_json, lines=lines)


MetricNames = Annotated[
    str | None,
    typer.Option(help=f"Comma-separated, of {SPELLED}."),
]


@app.command()
def evaluate(
    out: Out,
    checkpoint: Annotated[
        str | None, typer.Option(help="A weights file or a bundled name, with --data.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A dataset with a test split.")] = None,
    generated: Annotated[
        str | None, typer.Option(help="A folder of videos, with --reference.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The videos that they should be.")] = None,
    catalog: Annotated[
        str | None,
        typer.Option(
            help="A catalog that `kpmask animate` finished: a folder or s3://. Its results are "
            "scored as they are."
        ),
    ] = None,
    metrics: MetricNames = None,
    setting: Annotated[
        str | None,
        typer.Option(
            help="reconstruction (a clip from its first frame), cross (another identity's motion) "
            "or few_shot (a person's held-out frames from one of them)."
        ),
    ] = None,
    motion: Annotated[
        str | None,
        typer.Option(
            help="For cross: absolute or relative. Default: absolute; of a catalog what it has."
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="For cross: a CSV with columns source,driving, of clips' names or ids."),
    ] = None,
    num_pairs: Annotated[
        int | None, typer.Option(help="For cross without --pairs: how many at most. Default: 50.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    preset: Preset = None,
    job: JobFile = None,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers; default one a CPU.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on a test split, a folder of videos against another, or a catalog.

    Two folders' videos are matched by name, and their frames by number, whatever their rates.

    A catalog's results are compared with its images and driving videos, as in the setting cross.

    Examples:

        kpmask evaluate --checkpoint w.safetensors --data data/taichi --out scores

        kpmask evaluate --generated made --reference wanted --metrics l1,ssim --out scores

        kpmask evaluate --checkpoint w --data d --out scores --set protocol.first_frame=in

        kpmask evaluate --checkpoint w --data d --out cross --setting cross --motion relative
        --metrics csim_source_sface,akd_motion_facemesh

        kpmask evaluate --checkpoint w --data d --out few --setting few_shot --metrics ssim

        kpmask evaluate --catalog s3://bucket/shop --out scores
        --metrics csim_source_sface,akd_motion_facemesh
    """
    resolved = config.resolve_job(
        config.EvaluateJob,
        preset=preset,
        job_file=job,
        overrides=overrides or (),
        flags={
            "checkpoint": checkpoint,
            "data": data,
            "generated": generated,
            "reference": reference,
            "catalog": catalog,
            "out": out,
            "metrics": _listed(metrics),
            "setting": _given(kind=setting, motion=motion, pairs=pairs, num_pairs=num_pairs),
            "device": device,
            "cluster": _workers(workers),
        },
    )
    from flows import jobs
    from flows.score_lines import score_lines

    if dry_run:
        say_plan(resolved, jobs.plan_evaluate(resolved), as_json=as_json)
        return
    scores = jobs.run_evaluate(resolved, quiet=as_json)
    console.show(jobs.as_result(scores), as_json=as_json, lines=score_lines(scores))


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="A dataset that `kpmask preprocess` made.")],
    out: Out,
    preset: Preset = None,
    systems: Annotated[
        str | None,
        typer.Option(help="Comma-separated, of the preset's; default: all but fomm-adv."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="The budget of each system, all its phases together.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="The same in minutes of training, measured at the start.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated; default: 0.")] = None,
    metrics: MetricNames = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    job: JobFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train systems on the same data with the same budget, and score them side by side.

    Examples:

        kpmask compare --preset actions64 --data data/actions --out compared --minutes 30

        kpmask compare --preset debug --systems fomm,heatmap --steps 8 --data data/mine --out try
    """
    if preset is None:
        raise ConfigError("the systems are a preset's: give --preset", subject="preset")
    listed = config.compared_systems(preset)
    resolved = config.resolve_job(
        config.CompareJob,
        preset=preset,
        job_file=job,
        overrides=overrides or (),
        flags={
            "data": data,
            "out": out,
            "steps": steps,
            "minutes": minutes,
            "seeds": None if seeds is None else _numbers(seeds, "--seeds"),
            "metrics": _listed(metrics),
            "device": device,
        },
        systems=_listed(systems) or listed,
    )
    from flows import jobs

    if dry_run:
        say_plan(resolved, jobs.plan_compare(resolved), as_json=as_json)
        return
    comparison = jobs.run_compare(resolved, quiet=as_json)
    console.show(
        jobs.as_result(comparison), as_json=as_json, lines=jobs.comparison_lines(comparison)
    )


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _numbers(text: str, subject: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not numbers and commas", subject=subject) from None


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="Folder for everything that it makes.")] = (
        "demo-out"
    ),
    open_page: Annotated[bool, typer.Option("--open", help="Open the page when done.")] = False,
    preset: Annotated[str, typer.Option("--preset", help="What to train.")] = "demo",
    videos_only: Annotated[
        bool, typer.Option("--videos-only", help="Only write the videos, tables and images.")
    ] = False,
    num_videos: Annotated[
        int | None, typer.Option(min=2, help="With --videos-only: how many; default 36.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --videos-only: which people; default 0.")
    ] = None,
    varied: Annotated[
        bool, typer.Option("--varied", help="With --videos-only: people and scenes of all kinds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Generate videos, animate them with the bundled weights, and train for a minute to compare.

    Examples:

        kpmask demo

        kpmask demo --out /tmp/demo --open
    """
    from flows import jobs

    if videos_only:
        table = jobs.draw_videos(
            Path(out), num_videos=num_videos, seed=seed, varied=varied, quiet=as_json
        )
        console.show({"metadata": str(table)}, as_json=as_json, lines=[f"metadata: {table}"])
        return
    if num_videos is not None or seed is not None or varied:
        raise ConfigError("goes with --videos-only", subject="--num-videos, --seed, --varied")
    page = jobs.run_demo(Path(out), preset=preset, quiet=as_json)
    console.show({"page": str(page)}, as_json=as_json, lines=[f"Look at: {page.as_uri()}"])
    if open_page:
        typer.launch(page.as_uri())


@app.command()
def report(
    uri: Annotated[
        str, typer.Argument(help="What a job got as --out, or a folder that holds several of them.")
    ],
) -> None:
    """Write the page of a finished job again from its manifests.

    Of a folder that holds several jobs: each one's page, and overview.html over them.

    Examples:

        kpmask report runs/taichi

        kpmask report outputs
    """
    from flows import jobs

    typer.echo(jobs.rebuild_page(uri))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A video or picture.")],
    anchors: Annotated[
        Path | None, typer.Option(help="PEM certificates of those whose word is trusted.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a file says of its making (content credentials), and whether that holds.

    The exit status is 0 where it does, and 1 where the file says nothing or was changed.

    Examples:

        kpmask inspect out.mp4
    """
    from flows import credentials
    from kpmask.records import as_dict

    found = credentials.read(file, anchors)
    result = None if found is None else as_dict(found)
    console.show(result, as_json=as_json, lines=credentials.lines(file, found))
    if found is None or found.state == "invalid":
        raise typer.Exit(console.EXIT_FAILED)


@checkpoint_app.command("info")
def checkpoint_info(
    file: Annotated[str, typer.Argument(help="A weights file, or the name of bundled ones.")],
    as_json: AsJson = False,
) -> None:
    """What a weights file holds.

    Examples:

        kpmask checkpoint info weights.safetensors
    """
    from kpmask.bundled import locate
    from kpmask.checkpoint import describe

    found = describe(locate(file))
    console.show(found, as_json=as_json, lines=[f"{k}: {v}" for k, v in found.items()])


@checkpoint_app.command("list")
def checkpoint_list(as_json: AsJson = False) -> None:
    """The weights that come with kpmask: what `--checkpoint` takes by name.

    Examples:

        kpmask checkpoint list
    """
    from kpmask import bundled

    found = bundled.entries()
    lines = [bundled.names_hint()] if not found else []
    for name, entry in found.items():
        scores = ", ".join(f"{metric} {value:.4f}" for metric, value in entry.scores.items())
        lines += [
            f"{name}: {entry.system}, {entry.image_size_px} px, {entry.parameters:,} parameters, "
            f"{entry.size_bytes / 1e6:.1f} MB",
            f"    sha256  {entry.sha256}",
            f"    made by {entry.command or 'an unrecorded command'}",
            f"    scores  {scores or 'none'}",
        ]
    result = {name: entry.model_dump(mode="json") for name, entry in found.items()}
    console.show(result, as_json=as_json, lines=lines)


@checkpoint_app.command("release")
def checkpoint_release(
    src: Annotated[str, typer.Argument(help="A weights file of `train`.")],
    out: Annotated[Path, typer.Option("--out", help="The small file to write.")],
    name: Annotated[
        str | None, typer.Option(help="List it under this name in index.toml beside it.")
    ] = None,
    command: Annotated[str, typer.Option(help="What made it, for the index.")] = "",
    scores: Annotated[
        str | None, typer.Option(help="An output of `evaluate`, for the index.")
    ] = None,
    max_mb: Annotated[float, typer.Option(help="Refuse to write a longer file.")] = 12.0,
) -> None:
    """Make a small file for shipping: float16, without what only training needs.

    Examples:

        kpmask checkpoint release run/weights.safetensors --out small.safetensors
    """
    from tasks.release import release

    made = release(
        src, out, name=name, command=command, scores=scores, max_bytes=round(max_mb * 1e6)
    )
    typer.echo(
        f"{out}: {made.size_bytes / 1e6:.2f} MB, sha256 {made.sha256}; "
        f"frames differ by {255 * made.difference:.3f}/255 at most"
    )


@checkpoint_app.command("import")
def checkpoint_import(
    src: Annotated[Path, typer.Argument(help="An original .pth.tar file.")],
    out: Annotated[Path, typer.Option("--out", help="The weights file to write.")],
    system: Annotated[
        str | None,
        typer.Option(help="fomm, keypoint-mask or refined-mask; default: by what the file holds."),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="The original YAML configuration.")
    ] = None,
    kp_detector: Annotated[
        Path | None, typer.Option(help="Take the keypoint detector from this file instead.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="heatmap, circles or softmax; default: by the config.")
    ] = None,
    align_corners: Annotated[
        bool | None,
        typer.Option(help="How fomm's warps count pixels; default: as torch 1.0 to 1.2 did."),
    ] = None,
) -> None:
    """Read an original FOMM, keypoint-mask or refined-mask checkpoint, whole or not at all.

    Examples:

        kpmask checkpoint import vox-cpk.pth.tar --out vox.safetensors

        kpmask checkpoint import 00000099-checkpoint.pth.tar --config q.yaml --out q.safetensors
    """
    from kpmask.upstream import import_checkpoint

    found = import_checkpoint(
        src,
        out,
        system=system,
        config=config_file,
        kp_detector=kp_detector,
        mask=mask,
        align_corners=align_corners,
    )
    typer.echo(f"{out}: {found}")


@app.command()
def deploy(
    job: Annotated[
        str | None, typer.Option("--job", help="A TOML file; its [preprocess] is scheduled.")
    ] = None,
    cron: Annotated[
        str | None, typer.Option(help="When to preprocess; default: 0 3 * * *, every night.")
    ] = None,
    every: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="The same as a pause between starts.")
    ] = None,
    timezone: Annotated[str, typer.Option(help="Of the schedule.")] = "UTC",
    pool: Annotated[str, typer.Option(help="The work pool that runs it.")] = "kpmask",
    overrides: Overrides = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Run due jobs in this process; needs no worker.")
    ] = False,
) -> None:
    """Register the jobs as Prefect deployments, preprocessing on a schedule.

    Needs PREFECT_API_URL.

    Examples:

        kpmask deploy --job nightly.toml --cron '0 3 * * *'

        kpmask deploy --job nightly.toml --every 600 --serve
    """
    from flows import jobs

    for line in jobs.deploy(
        cron=cron,
        every_s=every,
        timezone=timezone,
        pool=pool,
        job_file=job,
        overrides=overrides or (),
        serve=serve,
    ):
        typer.echo(line)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, what is missing, and how to mend it.

    Examples:

        kpmask doctor
    """
    from dataclasses import asdict

    from flows.doctor import run_checks

    checks = run_checks()
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.verdict]}  {check.name:<14} {check.found}")
        if check.mend:
            lines.append(f"      {'':<14} -> {check.mend}")
    console.show([asdict(c) for c in checks], as_json=as_json, lines=lines)
    if any(check.verdict == "bad" for check in checks):
        raise typer.Exit(console.EXIT_FAILED)


def main() -> None:
    """The entry point of the `kpmask` command."""
    own_process()
    app(prog_name="kpmask")
