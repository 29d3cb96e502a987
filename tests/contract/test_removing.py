"""Messages are removed without a claim."""

from backends import bodies


def test_a_free_message_is_deleted_by_its_id_and_a_claimed_one_only_when_its_claim_has_lapsed(
    service, browser, queues, queue, claim
):
    ids = queues.post(queue, ["claimed", "deleted", "left"])
    claim(queues)

    browser.delete(queue, ids[:2])
    browser.delete(queue, [ids[1], f"{ids[2]}0", ids[2][:-1] + "z", "", "x"])  # gone, or never there

    assert bodies(browser.browse(queue)[0]) == ["claimed", "left"]
    service.advance(61)
    browser.delete(queue, ids[:1])
    assert bodies(claim(queues, 2)) == ["left"]


def test_a_delete_leaves_other_queues_alone(browser, queues, queue, other_queue, claim):
    ids = queues.post(queue, ["kept"])

    browser.delete(other_queue, ids)

    assert bodies(claim(queues)) == ["kept"]


def test_a_purge_removes_all_messages_of_its_queue_claimed_ones_too(service, queues, rival, queue, other_queue, claim):
    queues.post(queue, ["claimed", "free"])
    queues.post(other_queue, ["elsewhere"])
    claim(queues)

    rival.purge(queue)

    service.advance(61)
    assert claim(queues) is None
    assert bodies(claim(queues, 2, of=other_queue)) == ["elsewhere"]
    queues.post(queue, ["new"])
    assert bodies(claim(queues, 2)) == ["new"]
