//! The authorizers and the fake meter keep their contracts; each clause has a saboteur that its own check catches.
#![cfg(feature = "conformance")]

use iaas_core::testing::conformance::Matrix;
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

#[tokio::test]
async fn authorizer_saboteurs_are_caught() {
    let clean = authorizer::FakeAuthorizerRig;
    let matrix = Matrix::of("authorizer", authorizer::suite(), &clean, &authorizer::saboteurs()).await;
    println!("{matrix}");
    matrix.assert_caught();
}

#[tokio::test]
async fn meter_saboteurs_are_caught() {
    let clean = meter::FakeMeterRig::default();
    let matrix = Matrix::of("meter", meter::suite(), &clean, &meter::saboteurs()).await;
    println!("{matrix}");
    matrix.assert_caught();
}
