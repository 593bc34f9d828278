"""`lorry-train` with a worker that runs out of memory (`hungry_worker.py`)."""

import stages.train.torchrun
from entrypoints.train import main

if __name__ == "__main__":
    stages.train.torchrun.WORKER = "tests.train.hungry_worker"
    main()
