"""Publish adapter or merged weights with a model card, privately by default."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from glassloop.cli.generate import add_run_options, overrides_of
from glassloop.config.options import Options
from glassloop.loop.commands import evaluate_command


def main(argv: list[str]) -> int:
    """`glassloop push RUN REPO [--dry-run FOLDER]`.

    Exit code 0; 2 for refused input.
    """
    own = Options(
        prog="glassloop push",
        allow_abbrev=False,
        description="Uploads weights, tokenizer, chat template and a card. Never rows, answers, "
        "capsules, optimizer state, config.yaml or env.json.",
    )
    add_run_options(own)
    own.add_argument("repo", metavar="REPO", help="owner/name on the hub")
    own.add_argument(
        "--dry-run",
        type=Path,
        metavar="FOLDER",
        help="write what would be uploaded into a new folder; upload nothing",
    )
    own.add_argument(
        "--merged",
        type=Path,
        metavar="OUT",
        help="publish this folder of glassloop merge instead of the adapter",
    )
    own.add_argument("--public", action="store_true", help="let anybody read it")
    own.add_argument(
        "--base-id",
        metavar="ID",
        help="hub id of the base, where it was trained from a local folder",
    )
    own.add_argument(
        "--licence", metavar="TEXT", help="licence of the base, where glassloop does not know it"
    )
    own.add_argument(
        "--data-licence",
        metavar="TEXT",
        help="licence of the data, where glassloop does not know it",
    )
    return run(own.parse_args(argv))


def unwritable(given: argparse.Namespace, error: OSError) -> ValueError:
    return ValueError(
        f"--dry-run {given.dry_run} cannot be written ({error.strerror}): name another place"
    )


def run(given: argparse.Namespace) -> int:
    from glassloop.loop.launch import hush

    hush(1)  # before anything imports bitsandbytes
    from glassloop.disk.cache import published
    from glassloop.plan.steps import counted
    from glassloop.use.card.facts import facts_of
    from glassloop.use.card.staging import is_weights, stage
    from glassloop.use.card.upload import check_repo, login, upload
    from glassloop.use.trained import open_trained

    check_repo(given.repo)
    if given.dry_run is not None and given.dry_run.exists():
        raise ValueError(f"--dry-run {given.dry_run} exists: name a folder that does not")
    if given.merged is not None and not given.merged.is_dir():
        raise ValueError(
            f"--merged {given.merged} is no folder: name one that glassloop merge wrote"
        )
    trained = open_trained(given.run, given.at, overrides_of(given))
    facts = facts_of(
        trained,
        base_id=given.base_id,
        licence=given.licence,
        data_licence=given.data_licence,
        merged=given.merged,
    )
    api = None if given.dry_run is not None else login()  # before gigabytes are copied and searched
    print(f"adapter   {trained.checkpoint}, {trained.why}")
    for missing, option in (
        (facts.base_licence, "--licence"),
        (facts.data_licence, "--data-licence"),
    ):
        if missing is None:
            print(f"          the card says that a licence is not known: {option} TEXT")
    if facts.evaluated is None:
        print(
            "          no evaluation of these weights with its uncertainty: "
            f"{evaluate_command(given.run)}"
        )
    if given.dry_run is not None:
        try:
            with published(given.dry_run, lambda _, error: unwritable(given, error)) as folder:
                names = stage(facts, folder, given.repo, given.merged)
        except OSError as error:
            raise unwritable(given, error) from error
        print(
            f"would go  to {given.repo}, {'public' if given.public else 'private'}: "
            f"{', '.join(names)}"
        )
        print(f"wrote     {given.dry_run}; read {given.dry_run / 'README.md'} before you publish")
        return 0
    # On one disk weights need no copy.
    beside = given.merged.absolute().parent if given.merged is not None else None
    with tempfile.TemporaryDirectory(prefix=".push-", dir=beside) as folder:
        names = stage(facts, Path(folder), given.repo, given.merged)
        message = f"{given.repo.partition('/')[2]}: after {counted(trained.state.update, 'update')}"
        done = upload(
            api,
            Path(folder),
            names,
            given.repo,
            public=given.public,
            message=message,
            stale=is_weights,
        )
    print(
        f"pushed    {', '.join(names)}\n          {done.address} "
        f"({'private' if done.private else 'public'})"
    )
    if done.private and given.public:
        print(
            "          it was there and is private, and stays so: its settings on the hub make it "
            "public"
        )
    if done.removed:
        print(
            f"removed   {', '.join(done.removed)}: left from an earlier upload, they would be "
            "loaded with these weights"
        )
    return 0
