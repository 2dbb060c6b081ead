import torch

from megatron_ext.kernels.philox import block_random, philox4x32


def test_known_answers() -> None:
    """The vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""
    for counter, seed, expected in (
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        words = philox4x32(tuple(torch.tensor([word]) for word in counter), seed)
        assert [int(word) for word in words] == expected


def test_bytes_are_those_of_the_words_and_differ_everywhere() -> None:
    rows, blocks = torch.arange(64)[:, None], torch.arange(64)[None]
    values = block_random(5, 0, rows, blocks)
    words = philox4x32((torch.tensor([3]), torch.tensor([2]), torch.tensor([0]), torch.tensor([0])), 5)
    assert values[2, 3].tolist() == [byte for word in words for byte in int(word).to_bytes(4, "little")]
    assert torch.equal(block_random(5, 0, rows[10:], blocks[:, 7:]), values[10:, 7:]), "only the place matters"
    for other in (block_random(6, 0, rows, blocks), block_random(5, 1, rows, blocks)):
        assert float((other == values).double().mean()) < 0.01
    assert abs(float(values.double().mean()) - 127.5) < 1 and set(values.flatten().tolist()) == set(range(256))
