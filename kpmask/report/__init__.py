"""Static HTML pages: dataset, training run, gallery, evaluation, and a demonstration's front.

- A page is one self-contained file that works from a folder or any static server: styles and
  script are inside, nothing is fetched from elsewhere, and its content security policy says so.
- Functions are pure: records in, HTML out. Pictures and videos are given as paths relative to the
  page (not yet percent-encoded) or as `data:` URIs.
- Everything shown is escaped: names come from file names and tables that strangers wrote.
- Pages are bounded: beyond `limit` rows the page says how many there are and where.

    dataset_page     contact sheet that plays, histograms, identities, failures, search
    DatasetSummary   what it needs, gathered from records that come one by one
    preview_strip    the picture of a clip on it; contact_sheet: of many clips in one
    run_page         curves to read off, samples over time, phases, weights, settings
    KeptWeights      a file on it; loss_curve_svg: its losses as one picture
    gallery_page     thousands of animations: search, order, groups, each beside its inputs
    poster           the still picture of one
    evaluation_page  methods x metrics, published numbers, worst and best clips, every score
    comparison_page  systems x metrics, margins, ablations, curves, strips
    demo_page        the four parts on one front page
    overview_page    jobs in a folder, and the way to their pages
    picture_uri      an image array as a small `data:` URI
"""

from __future__ import annotations

from kpmask.report.comparison import Curve, Strip, comparison_curves_svg, comparison_page
from kpmask.report.dataset import DatasetSummary, dataset_page
from kpmask.report.demo import Command, Link, demo_page
from kpmask.report.evaluation import evaluation_page
from kpmask.report.gallery import GalleryMedia, gallery_page, poster, poster_key
from kpmask.report.overview import FoundJob, JobKind, overview_page
from kpmask.report.page import picture_uri, relative_url
from kpmask.report.previews import (
    PREVIEW_FRAMES,
    contact_sheet,
    preview_frame_numbers,
    preview_key,
    preview_strip,
)
from kpmask.report.run import KeptWeights, loss_curve_svg, run_page

__all__ = [
    "PREVIEW_FRAMES",
    "Command",
    "Curve",
    "DatasetSummary",
    "FoundJob",
    "GalleryMedia",
    "JobKind",
    "KeptWeights",
    "Link",
    "Strip",
    "comparison_curves_svg",
    "comparison_page",
    "contact_sheet",
    "dataset_page",
    "demo_page",
    "evaluation_page",
    "gallery_page",
    "loss_curve_svg",
    "overview_page",
    "picture_uri",
    "poster",
    "poster_key",
    "preview_frame_numbers",
    "preview_key",
    "preview_strip",
    "relative_url",
    "run_page",
]
