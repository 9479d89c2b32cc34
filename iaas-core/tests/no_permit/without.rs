//! The request alone.

use iaas_core::engine::Engine;
use iaas_core::engine::Options;
use iaas_core::security::actions::Start;

async fn act(engine: &Engine, request: Start) {
    drop(engine.run(request, Options::default()).await);
}

fn main() {
    let _ = act;
}
