//! A permit by its constructor.

use std::sync::Arc;

use iaas_core::Rev;
use iaas_core::security::Permit;
use iaas_core::security::actions::Start;
use iaas_core::spi::authorizer::Principal;

fn forge(request: Start, who: Arc<Principal>) -> Permit<Start> {
    Permit::new(request, who, Vec::new(), Rev(0))
}

fn main() {
    let _ = forge;
}
