//! What the gate allowed is done. The other files differ from this one in one thing.

use iaas_core::engine::Engine;
use iaas_core::engine::Options;
use iaas_core::security::Permit;
use iaas_core::security::actions::Start;

async fn act(engine: &Engine, permit: Permit<Start>) {
    drop(engine.run(permit, Options::default()).await);
}

pub(crate) fn main() {
    let _ = act;
}
