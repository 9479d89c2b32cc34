//! Every fake keeps its contract, in this process and over the wire; and so does what this crate itself brings.

use std::sync::Arc;

use iaas_core::engine::placement::FirstFit;
use iaas_core::spi::placement::Placement;
use iaas_core::testing::conformance::artifacts;
use iaas_core::testing::conformance::fakes::*;
use iaas_core::testing::conformance::hypervisor;
use iaas_core::testing::conformance::inventory;
use iaas_core::testing::conformance::meter;
use iaas_core::testing::conformance::net_program;
use iaas_core::testing::conformance::plugs;
use iaas_core::testing::conformance::rig::Wrapped;
use iaas_core::testing::conformance::small;
use iaas_core::testing::conformance::volume_access;
use iaas_core::testing::conformance::volume_pool;
use iaas_core::testing::conformance::wire::Wire;
use iaas_core::testing::conformance::wire::WiredMeter;

/// Runs each suite on its rig, and on the same rig with a unix socket between.
macro_rules! suites {
    ($($name:ident: $suite:ident on $rig:ident;)+) => {
        mod direct {
            use super::*;
            $(
                #[tokio::test]
                async fn $name() {
                    $suite::run(&$rig::default()).await.assert_clean();
                }
            )+
        }

        mod remote {
            use super::*;
            $(
                #[tokio::test]
                async fn $name() {
                    $suite::run(&Wrapped::new($rig::default(), Wire)).await.assert_clean();
                }
            )+
        }
    };
}

suites! {
    the_fake_hypervisor: hypervisor on FakeHypervisorRig;
    the_fake_artifacts: artifacts on FakeArtifactsRig;
    the_fake_pool: volume_pool on FakePoolRig;
    the_fake_access: volume_access on FakeAccessRig;
    the_fake_network: net_program on FakeNetRig;
    the_fake_plugs: plugs on FakePlugsRig;
    the_fake_inventory: inventory on FakeInventoryRig;
}

#[tokio::test]
async fn the_fake_meter_over_the_wire() {
    meter::run(&WiredMeter::new(meter::FakeMeterRig::default())).await.assert_clean();
}

#[tokio::test]
async fn the_fakes_that_own_nothing_on_a_host() {
    small::run_audit(&FakeAuditRig::default()).await.assert_clean();
    small::run_keys(&FakeKeysRig::default()).await.assert_clean();
    small::run_placement(&FakePlacementRig).await.assert_clean();
}

#[tokio::test]
async fn first_fit_keeps_the_contract_of_placements() {
    small::run_placement(&FirstFitRig).await.assert_clean();
}

struct FirstFitRig;

impl small::PlacementRig for FirstFitRig {
    fn placement(&self) -> Arc<dyn Placement> {
        Arc::new(FirstFit)
    }
}
