//! The packet engine's benchmarks on ports in memory.

use criterion::Criterion;
use iaas_benches::NetworkRig;
use iaas_net::testing::Mem64;

/// Two ports of one subnet, one flow.
#[derive(Debug)]
struct Reference(Mem64);

impl NetworkRig for Reference {
    fn forward(&mut self) -> u64 {
        self.0.round() as u64
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    iaas_benches::network(&mut criterion, &mut Reference(Mem64::new().expect("two ports")));
    criterion.final_summary();
}
