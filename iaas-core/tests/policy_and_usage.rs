//! The authorizers and the fake meter keep their contracts.

use iaas_core::testing::conformance::authorizer;
use iaas_core::testing::conformance::meter;

// A cloud without a sink keeps its audit log in its own store; the only sink yet is the fake.
// surface: AuditSink::append excused by CloudBuilder::audit

#[tokio::test]
async fn the_fake_authorizer_keeps_its_contract() {
    authorizer::run(&authorizer::FakeAuthorizerRig).await.assert_clean();
}

#[tokio::test]
async fn rbac_keeps_the_contract_of_authorizers() {
    authorizer::run(&authorizer::RbacRig).await.assert_clean();
}

#[tokio::test]
async fn the_fake_meter_keeps_its_contract() {
    meter::run(&meter::FakeMeterRig::default()).await.assert_clean();
}
