"""Runs a job that `run.py` writes, in an environment with pyreft: python worker.py JOB RESULT"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality.job import Job
from quality.train import run

if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(Job.read(Path(sys.argv[1])))))
