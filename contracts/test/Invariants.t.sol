// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ProvenanceRegistry} from "../src/ProvenanceRegistry.sol";
import {Base} from "./Base.sol";

/// @notice Strangers, keys and recovery addresses do whatever comes to their minds with two logs; what must be is kept.
contract Handler is Base {
    ProvenanceRegistry public immutable REGISTRY;
    uint256 public anchored;

    mapping(bytes32 log => uint64 size) public sizeOf;
    mapping(bytes32 log => bytes32 root) public rootOf;
    mapping(bytes32 log => address key) public keyOf;
    mapping(bytes32 log => address recovery) public recoveryOf;
    mapping(bytes32 log => uint64 size) public pinnedOf;
    mapping(bytes32 log => bytes32 root) public pinnedRootOf;

    constructor() {
        REGISTRY = new ProvenanceRegistry();
        for (uint256 i = 0; i < 2; ++i) {
            bytes32 log = logAt(i);
            (keyOf[log], recoveryOf[log]) = (_actor(i + 1), _actor(i + 3));
            REGISTRY.openLog(bytes32(i), keyOf[log], recoveryOf[log]);
        }
    }

    function anchor(uint256 who, uint256 log, uint64 size, bytes32 root) external {
        (address caller, bytes32 which) = (_actor(who), logAt(log));
        size %= 1000; // small, so that heads often grow, and often do not
        bool must = caller == keyOf[which] && size > sizeOf[which];
        VM.prank(caller);
        try REGISTRY.anchor(which, size, root) {
            equal(must ? 1 : 0, 1);
            (sizeOf[which], rootOf[which]) = (size, root);
            ++anchored;
        } catch {
            equal(must ? 1 : 0, 0);
        }
    }

    function rotate(uint256 who, uint256 log, uint256 to) external {
        (address caller, bytes32 which) = (_actor(who), logAt(log));
        VM.prank(caller);
        try REGISTRY.rotateKey(which, _actor(to)) {
            equal(caller == keyOf[which] || caller == recoveryOf[which] ? 1 : 0, 1);
            keyOf[which] = _actor(to);
        } catch {}
    }

    function revoke(uint256 who, uint256 log) external {
        (address caller, bytes32 which) = (_actor(who), logAt(log));
        VM.prank(caller);
        try REGISTRY.revokeKey(which) {
            equal(caller == keyOf[which] || caller == recoveryOf[which] ? 1 : 0, 1);
            keyOf[which] = address(0);
        } catch {}
    }

    function pin(uint256 log) external {
        bytes32 which = logAt(log);
        try REGISTRY.pin(which) {
            if (pinnedOf[which] == 0) (pinnedOf[which], pinnedRootOf[which]) = (sizeOf[which], rootOf[which]);
        } catch {
            equal(sizeOf[which], 0);
        }
    }

    function _actor(uint256 who) private pure returns (address) {
        return address(uint160(0xAC700 + who % 5));
    }

    function logAt(uint256 which) public view returns (bytes32) {
        return REGISTRY.idOf(address(this), bytes32(which % 2));
    }
}

contract InvariantsTest is Base {
    Handler private _handler;

    function setUp() public {
        _handler = new Handler();
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(_handler);
    }

    /// @notice The latest head is the largest that its key anchored, whoever else tried what.
    function invariant_T20_the_latest_head_is_the_largest_that_the_key_anchored() public view {
        for (uint256 i = 0; i < 2; ++i) {
            bytes32 log = _handler.logAt(i);
            (bytes32 root, uint64 size,) = _handler.REGISTRY().latestOf(log);
            equal(size, _handler.sizeOf(log));
            equal(root, _handler.rootOf(log));
        }
    }

    function invariant_control_is_with_whom_it_was_given_to() public view {
        for (uint256 i = 0; i < 2; ++i) {
            bytes32 log = _handler.logAt(i);
            (address key, address recovery) = _handler.REGISTRY().controlOf(log);
            equal(key, _handler.keyOf(log));
            equal(recovery, _handler.recoveryOf(log));
        }
    }

    function invariant_T20_a_pinned_head_never_changes() public view {
        for (uint256 i = 0; i < 2; ++i) {
            bytes32 log = _handler.logAt(i);
            if (_handler.pinnedOf(log) == 0) continue;
            (uint64 size,) = _handler.REGISTRY().headOf(log, _handler.pinnedRootOf(log));
            equal(size, _handler.pinnedOf(log));
        }
    }
}
