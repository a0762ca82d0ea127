"""What the network sees: training images, what a policy makes of them (plots/augment_POLICY.png), and how fast it is.

python -m tools.augment --policy affine
python -m tools.augment --policy elastic --strength 2 --digits 6 --draws 12
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import imports
from common.cli import OneLineParser, command
from common.files import PROJECT_DIR, UsageError
from image_data.policies import POLICIES, get_policy
from tools.output import panels, write_figure

TIMED_BATCHES, BATCH_SIZE = 50, 128


def contact_sheet(originals: imports.torch.Tensor, drawn: Sequence[imports.torch.Tensor], title: str) -> imports.Figure:
    """A row an image: the original, then its draws; all are grey levels 0-255 [N, 1, H, W]."""
    columns, rows = len(drawn) + 1, len(originals)
    figure, _ = panels(0.8 * columns, 0.8 * rows + 0.7, rows, columns)
    for panel, image in zip(figure.axes, imports.torch.stack([originals, *drawn], dim=1).flatten(0, 1), strict=True):
        panel.imshow(image.squeeze(0), cmap="gray", vmin=0, vmax=255)
        panel.set_axis_off()
    figure.axes[0].set_title("original", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def show(args: argparse.Namespace) -> int:
    for name, smallest, largest in (("digits", 1, 100), ("draws", 1, 100), ("strength", 0, 10), ("seed", 0, 2**63 - 1)):
        if not smallest <= getattr(args, name) <= largest:
            raise UsageError(f"{name}: {getattr(args, name)} is not allowed; it must be from {smallest} to {largest}")
    try:
        policy = get_policy(args.policy, args.strength)
    except ValueError as error:
        raise UsageError(str(error)) from None
    from data_utils import load_images
    from image_data.augmentation import augment
    from tools.timing import seconds_of

    images, labels = load_images(args.data_dir, train=True)
    # the first of each digit, then the second of each, as far as asked for
    order = imports.torch.stack([(labels == digit).nonzero()[: 1 + args.digits // 10, 0] for digit in range(10)], dim=1)
    originals = images[order.flatten()[: args.digits]].unsqueeze(1).float()
    imports.torch.manual_seed(args.seed)
    drawn = [augment(originals, policy, imports.torch.rand(len(originals), policy.draws)) for _ in range(args.draws)]
    strength = "" if args.strength == 1 else f", strength {args.strength:g}"
    path = args.output_dir / "plots" / f"augment_{args.policy}.png"
    write_figure(path, contact_sheet(originals, drawn, f"--augment {args.policy}{strength}"), dpi=100)
    rates = []
    for _ in range(TIMED_BATCHES):
        batch = images[imports.torch.randint(len(images), (BATCH_SIZE,))].unsqueeze(1).float()
        draws = imports.torch.rand(BATCH_SIZE, policy.draws)
        rates.append(BATCH_SIZE / seconds_of(functools.partial(augment, batch, policy, draws)))
    print(
        f"{args.policy}{strength}: {statistics.median(rates):,.0f} images/s ({min(rates):,.0f}-{max(rates):,.0f}),"
        f" median of {TIMED_BATCHES} batches of {BATCH_SIZE} on {imports.torch.get_num_threads()} threads; {path}"
    )
    return 0


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Contact sheet and speed of an augmentation policy.")
    parser.add_argument("--policy", default="affine", help=f"one of {', '.join(POLICIES)} (affine)")
    parser.add_argument("--strength", type=float, default=1.0, help="factor of the policy's ranges (1)")
    parser.add_argument("--digits", type=int, default=10, help="how many images (10)")
    parser.add_argument("--draws", type=int, default=10, help="how many draws of each (10)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data_dir", type=Path, default=PROJECT_DIR / "data")
    parser.add_argument("--output_dir", type=Path, default=PROJECT_DIR)
    return parser


main = command(get_args_parser, show)

if __name__ == "__main__":
    sys.exit(main(None))
