//! A commit past the engine's door.

use iaas_core::engine::Engine;

async fn act(engine: &Engine) {
    drop(engine.committer().commit("nobody", |_| Ok(())).await);
}

fn main() {
    let _ = act;
}
