//! Price books, each in force from its moment until the next one's.

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::model::PriceBook;
use iaas_core::model::PriceBookSpec;
use jiff::Timestamp;

use crate::aggregate::Period;

/// The price books of a cloud by the moment from which they hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    books: Vec<(Id<PriceBook>, PriceBookSpec)>,
}

/// A part of a period and the book that is in force in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// The part.
    pub period: Period,
    /// The book's id.
    pub book: Id<PriceBook>,
    /// Its prices.
    pub prices: &'a PriceBookSpec,
}

impl Schedule {
    /// Adds a book.
    ///
    /// # Errors
    /// - [`ErrorKind::Invalid`](iaas_core::ErrorKind::Invalid): its currency is no ISO 4217 code, or differs from the
    ///   others'.
    /// - [`ErrorKind::Conflict`](iaas_core::ErrorKind::Conflict): another one holds from the same moment.
    pub fn insert(&mut self, book: Id<PriceBook>, prices: PriceBookSpec) -> Result<()> {
        check(&prices)?;
        let same = self.books.first().is_none_or(|(_, b)| b.currency == prices.currency);
        if !same {
            return Err(Error::invalid(format!("a price book in {} beside others", prices.currency))
                .remedy("keep one schedule per currency"));
        }
        match self.books.binary_search_by_key(&prices.from, |(_, b)| b.from) {
            Ok(_) => Err(Error::conflict(format!("two price books hold from {}", prices.from))
                .remedy("let one of them begin later")),
            Err(at) => {
                self.books.insert(at, (book, prices));
                Ok(())
            }
        }
    }

    /// The book in force at `at`.
    pub fn at(&self, at: Timestamp) -> Option<(Id<PriceBook>, &PriceBookSpec)> {
        let after = self.books.partition_point(|(_, b)| b.from <= at);
        let (id, book) = self.books.get(after.checked_sub(1)?)?;
        Some((*id, book))
    }

    /// Cuts `period` where prices change. What lies before the first book gets the first book, whose rating then
    /// refuses usage from before it held.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](iaas_core::ErrorKind::NotFound) if there is no book.
    pub fn parts(&self, period: Period) -> Result<Vec<Part<'_>>> {
        let none = || Error::not_found("there is no price book").remedy("create one");
        let first = self.books.partition_point(|(_, b)| b.from <= period.from()).saturating_sub(1);
        let books = self.books.get(first..).filter(|b| !b.is_empty()).ok_or_else(none)?;
        let mut parts = Vec::new();
        let mut from = period.from();
        for (n, (book, prices)) in books.iter().enumerate() {
            let next = books.get(n + 1).map_or(period.to(), |(_, b)| b.from.min(period.to()));
            if from < next || parts.is_empty() {
                parts.push(Part { period: Period::new(from, next.max(from))?, book: *book, prices });
            }
            from = from.max(next);
        }
        Ok(parts)
    }
}

/// Refuses a book that cannot be rated by.
pub(crate) fn check(prices: &PriceBookSpec) -> Result<()> {
    let code = &prices.currency;
    if code.len() == 3 && code.bytes().all(|b| b.is_ascii_uppercase()) {
        return Ok(());
    }
    // ISO 4217: three capital letters.
    Err(Error::invalid("the price book's currency is not an ISO 4217 code")
        .remedy("write three capital letters, as in `EUR`"))
}
