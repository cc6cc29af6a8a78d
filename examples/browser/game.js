// POPGym's RepeatPrevious: name the suit of the card that was shown some cards ago.
export const SUITS = ["♠", "♦", "♥", "♣"]; // in the order of POPGym's deck
export const SUIT_NAMES = ["spades", "diamonds", "hearts", "clubs"];
const RANKS = ["A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K"];

export class RepeatPrevious {
  // `back`: how many cards ago; POPGym's k is one more. `length`: cards of a game, of a deck of 52.
  constructor(back = 4, length = 24, random = Math.random) {
    this.back = back;
    this.length = length;
    this.deck = Array.from({ length: 52 }, (_, index) => ({ suit: index % 4, rank: RANKS[index >> 2] }));
    for (let last = 51; last > 0; last--) {
      const other = Math.floor(random() * (last + 1));
      [this.deck[last], this.deck[other]] = [this.deck[other], this.deck[last]];
    }
    this.turn = 0;
  }

  get card() {
    return this.deck[this.turn];
  }

  // The card that is asked for, or undefined as long as there is none.
  get asked() {
    return this.deck[this.turn - this.back];
  }

  get over() {
    return this.turn >= this.length;
  }

  next() {
    this.turn += 1;
  }
}
