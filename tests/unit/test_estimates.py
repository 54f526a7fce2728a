"""What the store's measurements say of the time that a sweep will take."""

from raysweep.estimates import MAX_MEASURED, Times, _seconds, _Sum
from raysweep.resources import Resources


class Records:
    """Provenances of stages of another device, which counts what is read."""

    num_read = 0

    def provenance(self, stage_id):
        self.num_read += 1
        return {"device": "cuda:0", "wall_seconds": 1.0, "world_size": 1}


def test_of_a_large_store_of_another_device_few_records_are_read():
    total = _Sum(set(), once=True)
    total.stages["sft"] = 10
    records = Records()
    finished = {f"sft-{index:05}" for index in range(2 * MAX_MEASURED)}
    assert _seconds(total, records, finished, Resources()) == Times()
    assert records.num_read == MAX_MEASURED
