"""Sub-networks of a network from PyPI: the losses are those of its own loop, and most of the work is fused."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/ofa_subnets.py"


def test_subnets_of_a_once_for_all_network(capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    main.__globals__.update(SUBNETS=4, IMAGES=4, RESOLUTION=64)
    main()
    text = capsys.readouterr().out
    (difference,) = re.findall(r"largest difference from the loop: (\S+)", text)
    assert float(difference) < 2e-5  # float32; losses of 4 to 5 nats
    (share,) = re.findall(r"([\d.]+)% of the multiply-accumulates fused", text)
    assert 90 <= float(share) < 100
    losses = [
        float(loss) for loss in re.findall(r"^loss ([\d.]+): sub-network \d, depths \[", text, flags=re.MULTILINE)
    ]
    assert len(losses) == 3
    assert losses == sorted(losses)
