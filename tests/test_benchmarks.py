"""Every benchmark runs, at the smallest size, to the row that it prints for the table of speeds.

What it measures means nothing at this size.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = "--layers 1 --width 64 --vocabulary 500"


def run(script, arguments, folder):
    """What the script prints; it must end well."""
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(*packages):
    return pytest.mark.peers(*packages)


def test_experiment(tmp_path):
    """The runs, the one with shuffled probabilities included; called again, it trains none of them again."""
    arguments = ("--seeds 1 --out out --settings none shuffled --finetune --max-steps=1 "
                 "--evaluate --max-new-tokens=1")
    printed = run("experiment.py", arguments, tmp_path)
    assert printed.count("finetune.py") == 2
