"""`kpmask dataset`: look at finished datasets, and move them in and out.

Without Prefect: nothing here is scheduled. Workers are Ray's.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from flows import console
from flows.options import AsJson, DryRun, JobFile, Out, Overrides, Preset, say_plan
from kpmask import config

app = typer.Typer(
    no_args_is_help=True, help="Look at a dataset, check it, or move it in and out of other forms."
)

Uri = Annotated[str, typer.Argument(metavar="URI", help="A dataset: a folder or s3://.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Ray workers; default one a CPU.")]


class Form(StrEnum):
    """How clips lie outside a dataset."""

    folders = "folders"
    mp4 = "mp4"
    webdataset = "webdataset"


class Split(StrEnum):
    train = "train"
    test = "test"


class Media(StrEnum):
    frames = "frames"
    mp4 = "mp4"


@app.command("info")
def info(uri: Uri, as_json: AsJson = False) -> None:
    """What a dataset holds: counts, sizes, failures by code, its version.

    Examples:

        kpmask dataset info data/taichi
    """
    from flows import dataset_jobs as jobs

    found = jobs.info(uri)
    console.show(jobs.as_result(found), as_json=as_json, lines=jobs.info_lines(found))


@app.command("verify")
def verify(uri: Uri, workers: Workers = None, as_json: AsJson = False) -> None:
    """Decode every frame of a dataset and hold it against its record; status 1 if one is wrong.

    Of PNG images every pixel is checked by the record's SHA-256. Of JPEG images, which do not give
    back the frames that they were made of, it is checked that they decode, their size and number.

    Examples:

        kpmask dataset verify data/taichi

        kpmask dataset verify s3://bucket/taichi --workers 8 --json
    """
    from flows import dataset_jobs as jobs

    found = jobs.verify(uri, workers=workers, quiet=as_json)
    console.show(jobs.as_result(found), as_json=as_json, lines=jobs.verify_lines(found))
    if found.problems:
        raise typer.Exit(console.EXIT_FAILED)


@app.command("export")
def export(
    uri: Uri,
    out: Out,
    form: Annotated[
        Form,
        typer.Option(
            "--as",
            help="folders: the original code's, train/<name>/0000000.png, lossless; "
            "mp4: train/<name>.mp4, lossy; webdataset: train-000000.tar, a sample a clip.",
        ),
    ],
    split: Annotated[Split | None, typer.Option(help="Only this split.")] = None,
    quality: Annotated[
        int,
        typer.Option(
            min=0,
            max=51,
            help="Of videos, x264's CRF: lossy, less so the lower (18: about 36 dB PSNR and more, "
            "export.json says what it was); even 0 halves the resolution of colours.",
        ),
    ] = 18,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="Videos in RGB that keep every pixel; few browsers play."),
    ] = False,
    media: Annotated[
        Media,
        typer.Option(
            help="In tars: frames (the images as stored, lossless) or mp4 (by --quality)."
        ),
    ] = Media.frames,
    max_samples: Annotated[int, typer.Option(min=1, help="In a tar.")] = 1000,
    max_tar_mb: Annotated[
        float, typer.Option(min=0.01, help="Of a tar; a longer clip is alone.")
    ] = (1000.0),
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a dataset as media files, with a metadata.csv from which `import` restores the rest.

    A rerun writes what is not there whole. export.json comes last: with it all is there.

    Examples:

        kpmask dataset export data/taichi --out taichi-png --as folders

        kpmask dataset export data/taichi --out taichi-mp4 --as mp4 --quality 12 --split test

        kpmask dataset export data/taichi --out s3://bucket/tars --as webdataset --max-tar-mb 500
    """
    job = config.validated(
        config.ExportJob,
        {
            "data": uri,
            "out": out,
            "form": form,
            "partition": split,
            "crf": quality,
            "lossless": lossless,
            "media": media,
            "max_samples": max_samples,
            "max_tar_bytes": round(max_tar_mb * 1e6),
            "cluster": {"num_workers": workers},
        },
    )
    from flows import dataset_jobs as jobs

    if dry_run:
        say_plan(job, jobs.plan_export(job), as_json=as_json)
        return
    made = jobs.export(job, quiet=as_json)
    console.show(jobs.as_result(made), as_json=as_json, lines=jobs.export_lines(made))


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder or s3:// of clips.")],
    out: Out,
    form: Annotated[
        Form,
        typer.Option(
            "--from",
            help="folders: a folder of pictures, or one picture of square frames, a clip; "
            "mp4: a video (.mp4, .gif, ...) a clip; webdataset: .tar files.",
        ),
    ],
    size_px: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cut to the centre square and scale; default: the preset's, or as it is."
        ),
    ] = None,
    fps: Annotated[float, typer.Option(help="Of pictures that do not say it.")] = 25.0,
    layout: Annotated[str | None, typer.Option(help="Of the dataset: shards or folders.")] = None,
    preset: Preset = None,
    job: JobFile = None,
    overrides: Overrides = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a dataset of clips that are media files: an export, or what others prepared.

    The split is that of the folder (train/, test/) or tar (train-*.tar), the identity the name up
    to the first '#'; what export wrote beside the media goes before both. Whole videos, and a split
    of them into clips, are the business of `kpmask preprocess --videos`. Of a preset's settings for
    preprocess the size, the storage and the limits count.

    Examples:

        kpmask dataset import taichi-png --from folders --out data/taichi

        kpmask dataset import s3://bucket/tars --from webdataset --out data/mine --preset taichi128
    """
    flags = {"out": out, "videos": source}
    resolved = config.resolve_job(
        config.PreprocessJob,
        preset=preset,
        job_file=job,
        overrides=overrides or (),
        flags={
            **flags,
            "storage": None if layout is None else {"layout": layout},
            "cluster": None if workers is None else {"num_workers": workers},
        },
    )
    from flows import dataset_jobs as jobs

    wanted = jobs.import_job(
        resolved,
        source,
        form=form,
        size_px=size_px or (resolved.clips.size_px if preset or job else None),
        fps=fps,
    )
    if dry_run:
        say_plan(wanted, jobs.plan_import(wanted), as_json=as_json)
        return
    made = jobs.import_(wanted, quiet=as_json)
    console.show(jobs.as_result(made), as_json=as_json, lines=jobs.import_lines(made))
