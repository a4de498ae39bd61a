// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Where the tree heads of provenance logs are anchored
/// @notice A log is an append-only RFC 9162 Merkle log that somebody keeps off chain. Its tree heads are written here
/// by the log's key, in growing size, and by nobody else: the contract has no owner, no upgrade and no fees.
/// @dev The latest head stands in storage, because it covers every earlier one: an inclusion proof into it holds for
/// each record of the log, and a consistency proof to it for each earlier head. Earlier heads are found by their
/// root among the events; a head that a contract must still see once it is no longer the latest can be pinned.
interface IProvenanceRegistry {
    /// @notice A log was opened.
    event LogOpened(bytes32 indexed log, address indexed key, address indexed recovery);
    /// @notice A tree head was anchored.
    event HeadAnchored(bytes32 indexed log, bytes32 indexed root, uint64 size);
    /// @notice A head stays in storage for good.
    event HeadPinned(bytes32 indexed log, bytes32 indexed root);
    /// @notice Another key anchors this log from now on.
    event KeyRotated(bytes32 indexed log, address indexed previous, address indexed key);
    /// @notice The log's key anchors no more. Unless the recovery address names another one, the log ends here.
    event KeyRevoked(bytes32 indexed log, address indexed key);
    /// @notice Another address may rotate and revoke the log's key from now on.
    event RecoveryChanged(bytes32 indexed log, address indexed previous, address indexed recovery);

    /// @notice The caller opened a log with this salt before.
    error AlreadyOpen(bytes32 log);
    /// @notice The caller may not do this with this log, or there is no such log.
    error NotInControl(bytes32 log, address caller);
    /// @notice A head that does not grow the log, or one beyond 2^48 - 1 records.
    error NotLarger(bytes32 log, uint64 size, uint64 latest);
    /// @notice The zero address is no key: revoke instead.
    error NoKey(bytes32 log);
    /// @notice Nothing was anchored for this log yet.
    error NothingAnchored(bytes32 log);

    /// @notice Opens a log. Its id is bound to the caller and the salt, so that nobody else can take it.
    /// @param salt What tells the caller's logs apart: the id that the log has off chain.
    /// @param key Anchors the log's heads.
    /// @param recovery May rotate or revoke the key, should it be lost or stolen; it never anchors. Zero: nobody may.
    function openLog(bytes32 salt, address key, address recovery) external returns (bytes32 log);

    /// @notice Anchors a tree head; called by the log's key.
    /// @param log The log's id, as `idOf` gives it.
    /// @param size How many records the head covers: more than every head before.
    /// @param root The head's RFC 9162 root.
    function anchor(bytes32 log, uint64 size, bytes32 root) external;

    /// @notice Keeps the latest head of a log in storage for good; anybody may, and pays for it.
    function pin(bytes32 log) external;

    /// @notice Gives the log to another key; called by its key or its recovery address.
    function rotateKey(bytes32 log, address key) external;

    /// @notice Ends the authority of the log's key; called by that key or by the recovery address.
    function revokeKey(bytes32 log) external;

    /// @notice Names another recovery address, or none (zero); called by the present one.
    function changeRecovery(bytes32 log, address recovery) external;

    /// @notice The id of the log that `opener` opens with `salt`.
    function idOf(address opener, bytes32 salt) external pure returns (bytes32 log);

    /// @notice The latest head of a log, and the block that anchored it; zeros if there is none.
    function latestOf(bytes32 log) external view returns (bytes32 root, uint64 size, uint64 number);

    /// @notice The head with that root, if it is the log's latest or pinned; zeros if not.
    function headOf(bytes32 log, bytes32 root) external view returns (uint64 size, uint64 number);

    /// @notice Who controls a log: the zero address where there is nobody.
    function controlOf(bytes32 log) external view returns (address key, address recovery);
}
