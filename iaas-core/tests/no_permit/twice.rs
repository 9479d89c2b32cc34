//! One permit for two effects.

use iaas_core::engine::Engine;
use iaas_core::engine::Options;
use iaas_core::security::Permit;
use iaas_core::security::actions::Start;

async fn act(engine: &Engine, permit: Permit<Start>) {
    drop(engine.run(permit, Options::default()).await);
    drop(engine.run(permit, Options::default()).await);
}

fn main() {
    let _ = act;
}
