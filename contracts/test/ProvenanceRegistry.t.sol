// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IProvenanceRegistry} from "../src/IProvenanceRegistry.sol";
import {ProvenanceRegistry} from "../src/ProvenanceRegistry.sol";
import {Base} from "./Base.sol";

contract ProvenanceRegistryTest is Base {
    address private constant KEY = address(0xA11CE);
    address private constant RECOVERY = address(0x5AFE);
    bytes32 private constant SALT = keccak256("salt");
    bytes32 private constant ROOT = keccak256("root");

    ProvenanceRegistry private _registry;
    bytes32 private _log;

    function setUp() public {
        _registry = new ProvenanceRegistry();
        _log = _registry.openLog(SALT, KEY, RECOVERY);
    }

    function testFuzz_a_log_belongs_to_whom_it_was_opened_for(address opener, bytes32 salt) public {
        bytes32 expected = _registry.idOf(opener, salt);
        VM.expectEmit(true, true, true, true);
        emit IProvenanceRegistry.LogOpened(expected, KEY, RECOVERY);
        VM.prank(opener);
        equal(_registry.openLog(salt, KEY, RECOVERY), expected);
        (address key, address recovery) = _registry.controlOf(expected);
        equal(key, KEY);
        equal(recovery, RECOVERY);
    }

    function testFuzz_T25_nobody_takes_the_id_of_anothers_log(address other) public {
        VM.assume(other != address(this) && other != address(0));
        VM.prank(other);
        bytes32 taken = _registry.openLog(SALT, other, other);
        if (taken == _log) revert NotEqual(taken, _log);
    }

    function test_a_log_is_opened_once_even_when_its_key_was_revoked() public {
        VM.prank(RECOVERY);
        _registry.revokeKey(_log);
        VM.prank(RECOVERY);
        _registry.changeRecovery(_log, address(0));
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.AlreadyOpen.selector, _log));
        _registry.openLog(SALT, KEY, RECOVERY);
    }

    function test_a_log_without_a_key_is_refused() public {
        bytes32 id = _registry.idOf(address(this), ROOT);
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NoKey.selector, id));
        _registry.openLog(ROOT, address(0), RECOVERY);
    }

    function testFuzz_an_anchored_head_is_found(uint48 size, bytes32 root, uint32 number) public {
        VM.assume(size != 0);
        VM.roll(number);
        VM.expectEmit(true, true, true, true);
        emit IProvenanceRegistry.HeadAnchored(_log, root, size);
        VM.prank(KEY);
        _registry.anchor(_log, size, root);

        (bytes32 latest, uint64 latestSize, uint64 number_) = _registry.latestOf(_log);
        equal(latest, root);
        equal(latestSize, size);
        equal(number_, number);
        (uint64 found, uint64 foundAt) = _registry.headOf(_log, root);
        equal(found, size);
        equal(foundAt, number);
    }

    function testFuzz_T20_a_head_that_does_not_grow_the_log_is_refused(uint48 first, uint64 second) public {
        VM.assume(first != 0);
        _anchor(first, ROOT);
        bool grows = second > first && second <= type(uint48).max;
        if (!grows) VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotLarger.selector, _log, second, first));
        VM.prank(KEY);
        _registry.anchor(_log, second, keccak256("other"));
    }

    function testFuzz_T20_nobody_but_the_key_anchors(address caller, uint48 size) public {
        VM.assume(caller != KEY);
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotInControl.selector, _log, caller));
        VM.prank(caller);
        _registry.anchor(_log, size, ROOT);
    }

    function testFuzz_nobody_but_key_and_recovery_rotates_or_revokes(address caller, address key) public {
        VM.assume(caller != KEY && caller != RECOVERY);
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotInControl.selector, _log, caller));
        VM.prank(caller);
        _registry.rotateKey(_log, key);
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotInControl.selector, _log, caller));
        VM.prank(caller);
        _registry.revokeKey(_log);
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotInControl.selector, _log, caller));
        VM.prank(caller);
        _registry.changeRecovery(_log, caller);
    }

    function testFuzz_T23_a_rotated_key_anchors_no_more_and_the_new_one_goes_on(address key, bool byRecovery) public {
        VM.assume(key != KEY && key != address(0));
        _anchor(5, ROOT);
        VM.expectEmit(true, true, true, true);
        emit IProvenanceRegistry.KeyRotated(_log, KEY, key);
        VM.prank(byRecovery ? RECOVERY : KEY);
        _registry.rotateKey(_log, key);

        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotInControl.selector, _log, KEY));
        VM.prank(KEY);
        _registry.anchor(_log, 6, ROOT);
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotLarger.selector, _log, 5, 5));
        VM.prank(key);
        _registry.anchor(_log, 5, ROOT);
        VM.prank(key);
        _registry.anchor(_log, 6, keccak256("next"));
        (, uint64 size,) = _registry.latestOf(_log);
        equal(size, 6);
    }

    function test_T23_a_revoked_key_anchors_no_more_until_recovery_names_another(bool byRecovery) public {
        _anchor(5, ROOT);
        VM.expectEmit(true, true, true, true);
        emit IProvenanceRegistry.KeyRevoked(_log, KEY);
        VM.prank(byRecovery ? RECOVERY : KEY);
        _registry.revokeKey(_log);

        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotInControl.selector, _log, KEY));
        VM.prank(KEY);
        _registry.anchor(_log, 6, ROOT);
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotInControl.selector, _log, KEY));
        VM.prank(KEY);
        _registry.rotateKey(_log, KEY);
        VM.prank(RECOVERY);
        _registry.rotateKey(_log, address(9));
        VM.prank(address(9));
        _registry.anchor(_log, 6, ROOT);
    }

    function test_a_thief_with_the_key_cannot_take_the_recovery_away() public {
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NotInControl.selector, _log, KEY));
        VM.prank(KEY);
        _registry.changeRecovery(_log, address(0));
        VM.expectEmit(true, true, true, true);
        emit IProvenanceRegistry.RecoveryChanged(_log, RECOVERY, address(8));
        VM.prank(RECOVERY);
        _registry.changeRecovery(_log, address(8));
    }

    function test_the_zero_address_is_no_key_to_rotate_to() public {
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NoKey.selector, _log));
        VM.prank(KEY);
        _registry.rotateKey(_log, address(0));
    }

    function testFuzz_a_pinned_head_outlives_later_ones(address caller, uint32 number) public {
        VM.roll(number);
        _anchor(5, ROOT);
        VM.expectEmit(true, true, true, true);
        emit IProvenanceRegistry.HeadPinned(_log, ROOT);
        VM.prank(caller);
        _registry.pin(_log);
        VM.roll(uint256(number) + 1);
        _anchor(6, keccak256("next"));
        _anchor(7, ROOT);
        _registry.pin(_log);

        (uint64 size, uint64 number_) = _registry.headOf(_log, ROOT);
        equal(size, 5);
        equal(number_, number);
        (size,) = _registry.headOf(_log, keccak256("next"));
        equal(size, 0);
    }

    function test_nothing_can_be_pinned_before_it_is_anchored() public {
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NothingAnchored.selector, _log));
        _registry.pin(_log);
        VM.expectRevert(abi.encodeWithSelector(IProvenanceRegistry.NothingAnchored.selector, ROOT));
        _registry.pin(ROOT);
    }

    function test_gas_of_a_head() public {
        _anchor(1, keccak256("first"));
        _anchor(1_000_000, keccak256("next"));
        uint256 spent = VM.snapshotGasLastCall("ProvenanceRegistry", "anchor");
        if (spent > 50_000) revert NotEqual(bytes32(spent), bytes32(uint256(50_000)));
        _registry.pin(_log);
        VM.snapshotGasLastCall("ProvenanceRegistry", "pin");
        VM.prank(RECOVERY);
        _registry.rotateKey(_log, address(9));
        VM.snapshotGasLastCall("ProvenanceRegistry", "rotateKey");
        _registry.openLog(ROOT, KEY, RECOVERY);
        VM.snapshotGasLastCall("ProvenanceRegistry", "openLog");
    }

    function _anchor(uint64 size, bytes32 root) private {
        VM.prank(KEY);
        _registry.anchor(_log, size, root);
    }
}
