import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


def test_dry_run_finds_no_error() -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("RMS norm", "SwiGLU backward", "cross entropy", "gradient norm", "AdamW"):
        assert name in done.stdout
