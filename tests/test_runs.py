from primeflow_perturbench.runs import costs


def test_the_costs_of_a_run_are_said_with_the_gpus_where_there_is_one():
    record = {"steps": 20_000, "seconds": 1234.5, "peak_memory": {"host_gib": 1.25}}
    assert costs(record) == "The run took 1,234 s (20,000 steps) and at most 1.2 GiB of memory."
    record["peak_memory"]["device_gib"] = 30.06
    assert costs(record).endswith("at most 1.2 GiB of memory and 30.1 GiB on the GPU.")
