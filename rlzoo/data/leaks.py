"""The same prompt twice: within the training prompts, or in training and validation alike.

Told by the token ids that a policy would see, whatever the prompts are called.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from rlzoo.errors import UserError
from rlzoo.ranks.exchange import all_gather
from rlzoo.types import Prompt

log = logging.getLogger(__name__)


def apart(train: Sequence[Prompt], val: Sequence[Prompt], on_overlap: str = "warn") -> list[Prompt]:
    """The training prompts, and a word on those that are also validated on, or stand there twice.

    Args:
        train, val: rendered prompts.
        on_overlap: what becomes of training prompts that are also validated on: `warn` keeps,
            `drop` leaves them out, `error` stops.

    Raises:
        UserError: there are such prompts, and `on_overlap=error`.
    """
    report_repeats(train)
    held_out = {prompt.token_ids: prompt for prompt in val}
    shared = [prompt for prompt in train if prompt.token_ids in held_out]
    if not shared:
        return list(train)
    num_val = len({prompt.token_ids for prompt in shared})
    example = f"{shared[0].id!r}"
    if held_out[shared[0].token_ids].id != shared[0].id:
        example += f", in validation {held_out[shared[0].token_ids].id!r}"
    conflicts = sum(held_out[prompt.token_ids].answer != prompt.answer for prompt in shared)
    found = f"{num_val} of {len(val)} validation prompts are also trained on (such as {example})"
    if conflicts:
        found += f", {conflicts} with another answer"
    if on_overlap == "error":
        raise UserError(
            f"{found}. Take them out of one of the files, or out of training with"
            " datamodule.on_overlap=drop."
        )
    if on_overlap == "drop":
        log.warning(f"{found}: {len(shared)} training prompts dropped.")
        return [prompt for prompt in train if prompt.token_ids not in held_out]
    log.warning(
        f"{found}: validation will look better than it is. datamodule.on_overlap=drop takes them"
        " out of training."
    )
    return list(train)


def tell_shared(train: set[int], val: set[int]) -> None:
    """Warns of validation prompts, by hashes of their token ids, that are also trained on."""
    if train & val:
        log.warning(
            f"{len(train & val)} of {len(val)} validation prompts are also trained on: val/loss"
            " will look better than it is. Take them out of one of the files."
        )


def check_alike(train: Sequence[Prompt], val: Sequence[Prompt]) -> None:
    """Raises a UserError, on every rank, unless all ranks have the same prompts; collective.

    A node with an older copy of a file would draw and score other prompts than the rest.
    """
    told = hashlib.blake2b(digest_size=8)
    for prompt in (*train, *val):  # the hash of whole numbers is the same in every process
        told.update(f"{prompt.id}\0{prompt.answer}\0{hash(prompt.token_ids)}\n".encode())
    digests = all_gather((told.hexdigest(), len(train), len(val)))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        _, num_train, num_val = digests[others[0]]
        raise UserError(
            f"Rank {others[0]} read other prompts than rank 0: {num_train} and {num_val} of"
            f" validation, against {digests[0][1]} and {digests[0][2]}. Give every node the same"
            " files under data.path and val_path, and the same tokenizer."
        )


def report_repeats(prompts: Sequence[Prompt]) -> None:
    """Warns of training prompts that are rendered alike: each is planned and drawn for itself."""
    first: dict[tuple[int, ...], Prompt] = {}
    repeats, conflicts = [], 0
    for prompt in prompts:
        other = first.setdefault(prompt.token_ids, prompt)
        if other is not prompt:
            repeats.append((other, prompt))
            conflicts += other.answer != prompt.answer
    if repeats:
        other, prompt = repeats[0]
        but = f", {conflicts} of them with another answer" if conflicts else ""
        log.warning(
            f"{len(repeats)} training prompts are rendered like one before them{but} (such as"
            f" {prompt.id!r}, like {other.id!r}): they are planned, drawn and counted twice."
        )
