from data.order import TrainingOrder


def take(order, number):
    batches = iter(order)
    return [next(batches) for _ in range(number)]


def test_every_epoch_sees_every_picture_once_in_another_order():
    flat = [index for batch in take(TrainingOrder(10, 4, 0, 1, 0, 0), 5) for index in batch]
    assert [epoch for epoch, _ in flat] == [0] * 10 + [1] * 10
    first, second = [i for _, i in flat[:10]], [i for _, i in flat[10:]]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert flat != [index for batch in take(TrainingOrder(10, 4, 1, 1, 0, 0), 5) for index in batch]


def test_processes_share_the_batches_of_one():
    one = take(TrainingOrder(10, 8, 0, 1, 0, 0), 4)
    two = [take(TrainingOrder(10, 4, 0, 2, process, 0), 4) for process in range(2)]
    assert one == [first + second for first, second in zip(*two, strict=True)]


def test_order_goes_on_in_the_middle_of_an_epoch():
    assert take(TrainingOrder(10, 4, 0, 1, 0, 3), 4) == take(TrainingOrder(10, 4, 0, 1, 0, 0), 7)[3:]
