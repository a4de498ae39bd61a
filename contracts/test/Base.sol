// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice The cheat codes of forge that these tests use; forge-std is in no registry.
interface Vm {
    function prank(address caller) external;
    function roll(uint256 number) external;
    function assume(bool condition) external;
    function expectRevert(bytes calldata data) external;
    function expectEmit(bool topic1, bool topic2, bool topic3, bool data) external;
    function snapshotGasLastCall(string calldata group, string calldata name) external returns (uint256 gasUsed);
}

abstract contract Base {
    Vm internal constant VM = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

    error NotEqual(bytes32 got, bytes32 wanted);

    function equal(uint256 got, uint256 wanted) internal pure {
        if (got != wanted) revert NotEqual(bytes32(got), bytes32(wanted));
    }

    function equal(bytes32 got, bytes32 wanted) internal pure {
        if (got != wanted) revert NotEqual(got, wanted);
    }

    function equal(address got, address wanted) internal pure {
        equal(uint160(got), uint160(wanted));
    }
}
