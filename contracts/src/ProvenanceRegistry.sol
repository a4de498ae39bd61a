// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IProvenanceRegistry} from "./IProvenanceRegistry.sol";

/// @title The registry of provenance logs
contract ProvenanceRegistry is IProvenanceRegistry {
    /// @dev Anchoring writes the first two slots and reads no other: that is what a head costs.
    struct Log {
        bytes32 root;
        address key;
        uint48 size;
        uint48 number;
        address recovery;
        bool opened;
    }

    struct Pinned {
        uint64 size;
        uint64 number;
    }

    mapping(bytes32 log => Log) private _logs;
    mapping(bytes32 log => mapping(bytes32 root => Pinned)) private _pinned;

    /// @inheritdoc IProvenanceRegistry
    function openLog(bytes32 salt, address key, address recovery) external returns (bytes32 log) {
        log = idOf(msg.sender, salt);
        Log storage entry = _logs[log];
        if (entry.opened) revert AlreadyOpen(log);
        if (key == address(0)) revert NoKey(log);
        entry.key = key;
        entry.recovery = recovery;
        entry.opened = true;
        emit LogOpened(log, key, recovery);
    }

    /// @inheritdoc IProvenanceRegistry
    function anchor(bytes32 log, uint64 size, bytes32 root) external {
        Log storage entry = _logs[log];
        if (msg.sender != entry.key) revert NotInControl(log, msg.sender);
        if (size <= entry.size || size > type(uint48).max) revert NotLarger(log, size, entry.size);
        entry.root = root;
        // forge-lint: disable-next-line(unsafe-typecast)
        entry.size = uint48(size); // the check above bounds it
        // forge-lint: disable-next-line(unsafe-typecast)
        entry.number = uint48(block.number); // a block each second would take 8.9 million years
        emit HeadAnchored(log, root, size);
    }

    /// @inheritdoc IProvenanceRegistry
    function pin(bytes32 log) external {
        Log storage entry = _logs[log];
        if (entry.size == 0) revert NothingAnchored(log);
        Pinned storage pinned = _pinned[log][entry.root];
        // The first anchoring of a root is the one that counts: a second one, at another size, is no tree's.
        if (pinned.size != 0) return;
        pinned.size = entry.size;
        pinned.number = entry.number;
        emit HeadPinned(log, entry.root);
    }

    /// @inheritdoc IProvenanceRegistry
    function rotateKey(bytes32 log, address key) external {
        Log storage entry = _controlled(log);
        if (key == address(0)) revert NoKey(log);
        emit KeyRotated(log, entry.key, key);
        entry.key = key;
    }

    /// @inheritdoc IProvenanceRegistry
    function revokeKey(bytes32 log) external {
        Log storage entry = _controlled(log);
        emit KeyRevoked(log, entry.key);
        entry.key = address(0);
    }

    /// @inheritdoc IProvenanceRegistry
    function changeRecovery(bytes32 log, address recovery) external {
        Log storage entry = _logs[log];
        if (msg.sender != entry.recovery) revert NotInControl(log, msg.sender);
        emit RecoveryChanged(log, msg.sender, recovery);
        entry.recovery = recovery;
    }

    /// @inheritdoc IProvenanceRegistry
    function latestOf(bytes32 log) external view returns (bytes32 root, uint64 size, uint64 number) {
        Log storage entry = _logs[log];
        return (entry.root, entry.size, entry.number);
    }

    /// @inheritdoc IProvenanceRegistry
    function headOf(bytes32 log, bytes32 root) external view returns (uint64 size, uint64 number) {
        Pinned storage pinned = _pinned[log][root];
        if (pinned.size != 0) return (pinned.size, pinned.number);
        Log storage entry = _logs[log];
        if (entry.root == root) return (entry.size, entry.number);
        return (0, 0);
    }

    /// @inheritdoc IProvenanceRegistry
    function controlOf(bytes32 log) external view returns (address key, address recovery) {
        Log storage entry = _logs[log];
        return (entry.key, entry.recovery);
    }

    /// @inheritdoc IProvenanceRegistry
    function idOf(address opener, bytes32 salt) public pure returns (bytes32 log) {
        return keccak256(abi.encode(opener, salt));
    }

    /// @dev Nobody calls from the zero address, so a revoked key or a missing recovery address lets nobody in.
    function _controlled(bytes32 log) private view returns (Log storage entry) {
        entry = _logs[log];
        if (msg.sender != entry.key && msg.sender != entry.recovery) revert NotInControl(log, msg.sender);
    }
}
