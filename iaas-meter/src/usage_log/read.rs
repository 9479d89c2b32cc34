//! Reads records back, each checked by its crc.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::meter::UsageEvent;

use super::Damage;
use super::Place;
use super::format::RECORD_HEADER;
use super::format::decode_event;
use super::format::first_record;
use super::segment_path;

/// Calls `each` for the event at each of `places`, in their order.
pub(super) fn visit(folder: &Path, places: &[Place], mut each: impl FnMut(Place, UsageEvent)) -> Result<()> {
    let mut raw = Vec::new();
    for run in places.chunk_by(|a, b| a.segment == b.segment) {
        let Some(first) = run.first() else { continue };
        let file = File::open(segment_path(folder, first.segment)).map_err(|e| gone(*first, &e))?;
        for place in run {
            each(*place, event_at(&file, *place, &mut raw)?);
        }
    }
    Ok(())
}

fn event_at(file: &File, place: Place, raw: &mut Vec<u8>) -> Result<UsageEvent> {
    raw.clear();
    raw.resize(RECORD_HEADER + usize::try_from(place.length).unwrap_or(0), 0);
    file.read_exact_at(raw, place.offset.into()).map_err(|e| gone(place, &e))?;
    let event = first_record(raw).and_then(decode_event);
    event.ok_or_else(|| damage(place, "a record that was whole has changed").into())
}

fn gone(place: Place, why: &std::io::Error) -> Error {
    Error::from(damage(place, "it cannot be read")).because(why)
}

fn damage(place: Place, why: &str) -> Damage {
    Damage { segment: place.segment, offset: place.offset.into(), why: why.to_owned() }
}
