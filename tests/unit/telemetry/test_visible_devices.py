"""Which boards a process uses: every form of CUDA_VISIBLE_DEVICES, and every way to name a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermoe.errors import ConfigError
from thermoe.telemetry.devices import normalise_pci, normalise_uuid, select_devices, visible_devices
from thermoe.telemetry.source import Device

A = "GPU-aaaaaaaa-1111-2222-3333-444444444444"
B = "GPU-aaaabbbb-1111-2222-3333-444444444444"
C = "GPU-cccccccc-1111-2222-3333-444444444444"
SLICE = "MIG-dddddddd-1111-2222-3333-444444444444"
BOARDS = [
    Device(uuid=A, kind="gpu", name="H200", index=0, pci_bus_id="00000000:01:00.0"),
    Device(uuid=B, kind="gpu", name="H200", index=1, pci_bus_id="00000000:02:00.0", mig_uuids=(SLICE,), shared=True),
    Device(uuid=C, kind="gpu", name="H200", index=2, pci_bus_id="00000000:03:00.0"),
]
HOST = Device(uuid="host", kind="host", name="host")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", [A]),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        (A, [A]),
        ("GPU-cccc", [C]),
        ("gpu-CCCC", [C]),
        (f"{C},0", [C, A]),
        ("GPU-aaaa", []),
        (SLICE, [B]),
        ("MIG-dddd", [B]),
        (f"MIG-{A}/1/0", [A]),
        ("MIG-eeee", []),
        ("", []),
        ("   ", []),
        ("-1", []),
        ("0,-1,2", [A]),
        ("0,9,2", [A]),
        ("0,0,1", [A, B]),
        (f"0,{A}", [A]),
        ("NoDevFiles", []),
        ("void", []),
        ("0;1", []),
        ("٣", []),
        ("0x1", []),
        (",", []),
        ("GPU-", []),
    ],
)
def test_every_form_of_the_variable(text: str, expected: list[str]) -> None:
    found = visible_devices(BOARDS, {"CUDA_VISIBLE_DEVICES": text})
    assert [device.uuid for device in found.devices] == expected


def test_an_unset_variable_leaves_every_board() -> None:
    assert len(visible_devices(BOARDS, {}).devices) == 3


def test_a_slice_makes_its_board_shared() -> None:
    assert visible_devices(BOARDS, {"CUDA_VISIBLE_DEVICES": f"MIG-{A}/1/0"}).devices[0].shared


def test_what_was_passed_over_is_told() -> None:
    notes = visible_devices(BOARDS, {"CUDA_VISIBLE_DEVICES": "0,0,9"}).notes
    assert len(notes) == 2
    assert "twice" in notes[0]
    assert "ends at '9'" in notes[1]


@pytest.mark.parametrize(
    ("names", "order", "expected"),
    [
        (("H200", "H200"), "", "uuid"),
        (("H200", "T4"), "", "index"),
        (("H200", "T4"), "FASTEST_FIRST", "index"),
        (("H200", "T4"), "PCI_BUS_ID", "uuid"),
    ],
)
def test_an_index_is_only_trusted_where_both_numberings_agree(names: tuple, order: str, expected: str) -> None:
    boards = [Device(uuid=u, kind="gpu", name=n, index=i) for i, (u, n) in enumerate(zip((A, C), names, strict=True))]
    found = visible_devices(boards, {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": order}).devices[0]
    assert (found.mapped_by, found.provisional) == (expected, True)


def test_a_uuid_is_sure_on_a_mixed_machine_too() -> None:
    boards = [Device(uuid=A, kind="gpu", name="H200", index=0), Device(uuid=C, kind="gpu", name="T4", index=1)]
    found = visible_devices(boards, {"CUDA_VISIBLE_DEVICES": f"{C},0"}).devices
    assert [(device.uuid, device.mapped_by) for device in found] == [(C, "uuid"), (A, "index")]


@given(st.text(max_size=40) | st.text(alphabet="0123456789,- GPUMIGabcdef/", max_size=40))
def test_no_text_raises_or_counts_a_board_twice(text: str) -> None:
    found = visible_devices(BOARDS, {"CUDA_VISIBLE_DEVICES": text}).devices
    assert len({device.uuid for device in found}) == len(found)
    assert {device.uuid for device in found} <= {A, B, C}


def test_a_uuid_is_the_same_with_and_without_its_prefix() -> None:
    assert normalise_uuid("AAAA-bb") == normalise_uuid("gpu-aaaa-BB") == "GPU-aaaa-bb"


@pytest.mark.parametrize("text", ["0000:01:00.0", "00000000:01:00.0", "01:00.0", " 0000:01:00.0 "])
def test_a_pci_address_has_one_form(text: str) -> None:
    assert normalise_pci(text) == "00000000:01:00.0"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, [A, B, C, "host"]),
        (1, [B, "host"]),
        ("cuda:2", [C, "host"]),
        ("cuda", [A, B, C, "host"]),
        ("cpu", ["host"]),
        ("mps", ["host"]),
        ("0000:03:00.0", [C, "host"]),
        (A[4:].upper(), [A, "host"]),
        ([0, A], [A, "host"]),
        (SLICE, [B, "host"]),
        (SimpleNamespace(type="cuda", index=1), [B, "host"]),
        (SimpleNamespace(type="cuda", index=None), [A, B, C, "host"]),
        (SimpleNamespace(uuid=C[4:], name="H200"), [C, "host"]),
    ],
)
def test_every_way_to_name_a_device(wanted: object, expected: list[str]) -> None:
    assert [device.uuid for device in select_devices([*BOARDS, HOST], wanted)] == expected


@pytest.mark.parametrize("wanted", [7, "cuda:7", "GPU-eeee", "0000:09:00.0", SimpleNamespace(uuid="eeee")])
def test_a_device_that_is_not_there_is_an_error_with_the_choice(wanted: object) -> None:
    with pytest.raises(ConfigError, match="no measured device") as caught:
        select_devices([*BOARDS, HOST], wanted)
    assert A in (caught.value.accepted or "")


def test_asking_for_a_gpu_on_a_machine_without_one_gives_the_host_alone() -> None:
    assert select_devices([HOST], "cuda:0") == [HOST]
