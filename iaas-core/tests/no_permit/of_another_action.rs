//! A permit to start, where one to stop is needed.

use iaas_core::engine::Engine;
use iaas_core::engine::Options;
use iaas_core::security::Permit;
use iaas_core::security::actions::Start;
use iaas_core::security::actions::Stop;

async fn act(engine: &Engine, permit: Permit<Start>) {
    drop(engine.run::<Stop>(permit, Options::default()).await);
}

fn main() {
    let _ = act;
}
