//! A copy of a permit.

use iaas_core::security::Permit;
use iaas_core::security::actions::Start;

fn copy(permit: &Permit<Start>) -> Permit<Start> {
    Permit::clone(permit)
}

fn main() {
    let _ = copy;
}
