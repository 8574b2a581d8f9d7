from experiments.bench.bench import main
from minidpo.settings import run_main

if __name__ == "__main__":
    run_main(main)
