//! Which saboteurs each suite must catch.

use super::Spoil;
use super::Spoiler;
use crate::testing::conformance::Saboteur;
use crate::testing::conformance::artifacts::ArtifactsRig;
use crate::testing::conformance::fakes::FakeAccessRig;
use crate::testing::conformance::fakes::FakeArtifactsRig;
use crate::testing::conformance::fakes::FakeHypervisorRig;
use crate::testing::conformance::fakes::FakeInventoryRig;
use crate::testing::conformance::fakes::FakeNetRig;
use crate::testing::conformance::fakes::FakePlugsRig;
use crate::testing::conformance::fakes::FakePoolRig;
use crate::testing::conformance::hypervisor::HypervisorRig;
use crate::testing::conformance::inventory::InventoryRig;
use crate::testing::conformance::net_program::NetRig;
use crate::testing::conformance::plugs::PlugsRig;
use crate::testing::conformance::rig::Wrapped;
use crate::testing::conformance::volume_access::AccessRig;
use crate::testing::conformance::volume_pool::PoolRig;

macro_rules! spoiled {
    ($dyn:ty, $rig:ident: $($spoil:ident),+ $(,)?) => {
        vec![$(Saboteur::<$dyn> {
            clause: Spoil::$spoil.about().0,
            does: Spoil::$spoil.about().1,
            rig: || Box::new(Wrapped::new($rig::default(), Spoiler::new(Spoil::$spoil))),
        }),+]
    };
}

/// Those of every kind, then those named.
macro_rules! converge_and {
    ($dyn:ty, $rig:ident: $($spoil:ident),+ $(,)?) => {
        spoiled![$dyn, $rig: HelloRaises, ForgetsEpochs, ClaimsAtOnce, CreatesTwice, AcceptsOlder, KeepsAfterError,
            AbsentIsError, RemovesNewer, RemovesNothing, ForgetsObjects, SkipsFirst, ListsForeign, FencedButDone,
            RacesTwice, SaysNotDone, $($spoil),+]
    };
}

/// The saboteurs of a hypervisor.
pub fn hypervisor_saboteurs() -> Vec<Saboteur<dyn HypervisorRig>> {
    converge_and![dyn HypervisorRig, FakeHypervisorRig: BadIsInternal, UsageRestarts, RestartsDead, IgnoresOff,
        IgnoresReboot, ConsoleFromStart, HidesDeath, KeepsDevices, KindsLie, DropsFinal]
}

/// The saboteurs of a pool.
pub fn pool_saboteurs() -> Vec<Saboteur<dyn PoolRig>> {
    converge_and![dyn PoolRig, FakePoolRig: BadIsInternal, DirtyNew, LosesFlush, LosesOnGrow, LetsStaleWrite, FenceLies,
        KindsLie, LeaksSpace]
}

/// The saboteurs of access to a pool.
pub fn access_saboteurs() -> Vec<Saboteur<dyn AccessRig>> {
    converge_and![dyn AccessRig, FakeAccessRig: BadIsInternal, TermOff, OpensNothing]
}

/// The saboteurs of a store of artifacts.
pub fn artifacts_saboteurs() -> Vec<Saboteur<dyn ArtifactsRig>> {
    converge_and![dyn ArtifactsRig, FakeArtifactsRig: AcceptsAnyBytes, OneUpload]
}

/// The saboteurs of plugs.
pub fn plugs_saboteurs() -> Vec<Saboteur<dyn PlugsRig>> {
    converge_and![dyn PlugsRig, FakePlugsRig: BadIsInternal, UsageRestarts, TermOff, KnowsStranger, CountsHeaders]
}

/// The saboteurs of a network.
pub fn net_saboteurs() -> Vec<Saboteur<dyn NetRig>> {
    spoiled![dyn NetRig, FakeNetRig: HelloRaises, ForgetsEpochs, ClaimsAtOnce, SyncsInParts, SyncMerges, SyncForces,
        ForgetsProgram, AcceptsBad, ExplainFlips, LeaksAcross, PassesSpoofed]
}

/// The saboteurs of an inventory.
pub fn inventory_saboteurs() -> Vec<Saboteur<dyn InventoryRig>> {
    spoiled![dyn InventoryRig, FakeInventoryRig: HelloRaises, ForgetsEpochs, ZeroFacts, OldLease]
}
